"""The bank in the package: sound, complete, in the wheel, and it finds something."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import spacy

from spacy_sam.bank import ExpertBank, bundled_bank_path
from spacy_sam.calibration import Calibration

DOMAINS = ["biomedical", "legal", "news", "social_media", "stem", "traffic"]
ROOT = Path(__file__).parent.parent
MAX_BYTES = 64_000_000  # of the wheel


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank(bundled_bank_path())


def test_bundled_is_sound(bank):
    assert bank.check() == [*DOMAINS, "unified"]


def test_bundled_cards(bank):
    assert [card.name for card in bank.experts] == DOMAINS
    assert [card.name for card in bank.baselines] == ["unified"]
    for card in bank.experts:
        assert card.centroid is not None
        assert card.centroid.encoder == bank.encoder
        assert len(card.centroid.vector) == 384
        assert card.centroid.n_texts > 100
        assert {corpus.name for corpus in card.corpora} == set(card.scores)
        assert all(score.f > 0 for score in card.scores.values())


def test_bundled_calibration_is_the_one_that_was_measured(bank):
    results = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf8"))
    assert bank.calibration == Calibration(**results["calibration"])


def test_bundled_formats(bank):
    files = [path for path in bank.path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_bundled_readme_example():
    """The README's Python example, as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    docs = names["docs"]
    plan = names["nlp"].get_pipe("sam_ner").plan
    assert [doc.text for doc in docs] == names["texts"]
    assert 1 <= len(plan.task_models) <= 2
    assert [len(selection.scores) for selection in plan.selections] == [6, 6]
    for doc in docs:
        assert len(doc.spans["sc"].attrs["scores"]) == len(doc.spans["sc"])


def test_bundled_selects_by_domain_and_finds_entities():
    nlp = spacy.blank("en")
    sam = nlp.add_pipe("sam_ner", config={"labels": ["disease", "chemical"]})
    texts = ["The patient was given ibuprofen and developed acute renal failure.", "Breast cancer and ovarian cancer."]
    docs = list(nlp.pipe(texts))
    assert sam.plan.selections[0].scores[0][0] == "biomedical"
    assert "disease" in {ent.label_ for doc in docs for ent in doc.ents}


def test_bundled_is_in_the_wheel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "spacy_sam", source / "spacy_sam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("spacy_sam-*.whl")
    assert wheel.stat().st_size <= MAX_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    here = bundled_bank_path()
    assert {f"spacy_sam/bundled/{p.relative_to(here).as_posix()}" for p in here.rglob("*") if p.is_file()} <= names
    assert "spacy_sam/py.typed" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "scripts/")) for name in names)
