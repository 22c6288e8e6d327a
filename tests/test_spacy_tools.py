"""spaCy's own commands on a saved pipeline with `sam_ner`, without `--code`; and the config block of the docs."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import spacy
from fakes import plan_of
from pipelines import add_sam, ents
from remembering import REMEMBERED, REMEMBERED_LABELS
from spacy.tokens import DocBin
from spacy.util import load_config_from_str

from spacy_sam.bank import ExpertBank
from spacy_sam.component import SamNer
from spacy_sam.factory import make_sam_ner
from spacy_sam.settings import DEFAULT_CONFIG

DOCS = Path(__file__).parents[1] / "docs"
# Several commands in one process, as `python -m spacy` runs each: only the imports are not repeated.
CHAIN = """
import contextlib, io, json, sys, traceback
from spacy.cli._util import app
from spacy.util import registry
from typer.main import get_command
import spacy.cli

registry.cli.get_all()
command = get_command(app)
results = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out):
            command(arguments, prog_name="python -m spacy", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = traceback.format_exc()
    results.append([code, out.getvalue()])
print(json.dumps(results))
"""
CORPORA = ["--paths.train", "gold.spacy", "--paths.dev", "gold.spacy"]
COMMANDS: Dict[str, List[str]] = {
    "info": ["info", "model"],
    "accuracy": ["benchmark", "accuracy", "model", "gold.spacy", "--output", "accuracy.json"],
    "components": ["evaluate", "model", "gold.spacy", "--output", "components.json", "--per-component"],
    "apply": ["apply", "model", "texts.jsonl", "applied.spacy"],
    "speed": ["benchmark", "speed", "model", "gold.spacy", "--batch-size", "2", "--batches", "30", "--warmup", "1"],
    "threshold": ["find-threshold", "model", "gold.spacy", "sam_ner", "threshold", "ents_f", "--n_trials", "3"],
    "debug": ["debug", "config", "docs.cfg", *CORPORA],
    "debug wrong": ["debug", "config", "docs.cfg", *CORPORA, "--components.sam_ner.look_ahead", "0"],
    "assemble": ["assemble", "docs.cfg", "assembled", "--components.sam_ner.threshold", "0.25"],
    "function": ["find-function", "spacy_sam.TorchEngine.v1"],
}
PROJECT = """
title: Entities
directories: [out]
workflows:
  all: [evaluate]
commands:
  - name: evaluate
    help: "Score the pipeline"
    script:
      - "python -m spacy evaluate model gold.spacy --output out/metrics.json --displacy-path out"
    deps: [model, gold.spacy]
    outputs: [out/metrics.json]
"""


def config_blocks(file: Path) -> List[Any]:
    return [load_config_from_str(block) for block in re.findall(r"```ini\n(.*?)```", file.read_text("utf8"), re.S)]


def run(folder: Path, *arguments: str) -> str:
    """What a Python process in this folder prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(remembering_bank: ExpertBank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline that knows the answers, annotated documents, texts, and a config from the docs."""
    folder = tmp_path_factory.mktemp("tools")
    nlp = spacy.blank("en")
    sam = add_sam(
        nlp,
        bank=str(remembering_bank.path),
        labels=list(REMEMBERED_LABELS),
        selection="once",
        strategy={"selectors": {"similarity": None}},
        engine={"device": "cpu"},
    )
    sam.plan = plan_of(remembering_bank, "expert0", "expert1")
    nlp.to_disk(folder / "model")
    gold = DocBin()
    for text, spans in REMEMBERED.items():
        doc = nlp.make_doc(text)
        doc.set_ents([doc.char_span(*span) for span in spans])
        gold.add(doc)
    gold.to_disk(folder / "gold.spacy")
    lines = (json.dumps({"text": text}) + "\n" for text in REMEMBERED)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf8")
    config = spacy.blank("en").config.merge(config_blocks(DOCS / "usage.md")[0])
    config["nlp"]["pipeline"] = ["sam_ner"]
    config.to_disk(folder / "docs.cfg")
    (folder / "project.yml").write_text(PROJECT, encoding="utf8")
    return folder


@pytest.fixture(scope="module")
def printed(work: Path) -> Dict[str, Any]:
    """Exit code and output of each of `COMMANDS`."""
    results = json.loads(run(work, "-c", CHAIN, json.dumps(list(COMMANDS.values()))).splitlines()[-1])
    return dict(zip(COMMANDS, results, strict=True))


def output(printed: Dict[str, Any], name: str) -> str:
    code, out = printed[name]
    assert code == 0, f"{code}\n{out}"
    return out


def test_tools_project_run_and_document(work):
    """And through it `spacy evaluate`, in a process of its own, with displaCy's page of entities."""
    out = run(work, "-m", "spacy", "project", "run", "all", ".")
    assert re.search(r"NER F +100\.00", out)
    metrics = json.loads((work / "out" / "metrics.json").read_text(encoding="utf8"))
    assert metrics["ents_f"] == 1.0
    assert set(metrics["ents_per_type"]) == set(REMEMBERED_LABELS)
    page = (work / "out" / "entities.html").read_text(encoding="utf8")
    assert page.count("<mark") == sum(map(len, REMEMBERED.values()))
    run(work, "-m", "spacy", "project", "document", ".", "--output", "README.md")
    assert "Score the pipeline" in (work / "README.md").read_text(encoding="utf8")


def test_tools_benchmark_accuracy(work, printed):
    assert re.search(r"NER F +100\.00", output(printed, "accuracy"))
    assert json.loads((work / "accuracy.json").read_text(encoding="utf8"))["ents_p"] == 1.0
    output(printed, "components")
    assert json.loads((work / "components.json").read_text(encoding="utf8"))["sam_ner"]["ents_r"] == 1.0


def test_tools_apply(work, printed):
    output(printed, "apply")
    docs = list(DocBin().from_disk(work / "applied.spacy").get_docs(spacy.blank("en").vocab))
    assert [doc.text for doc in docs] == list(REMEMBERED)
    assert [ents(doc) for doc in docs] == list(REMEMBERED.values())
    assert all(len(doc.spans["sc"].attrs["scores"]) == len(doc.ents) for doc in docs)


def test_tools_benchmark_speed(printed):
    assert re.search(r"Mean: [\d.]+ words/s", output(printed, "speed"))


def test_tools_find_threshold(printed):
    rows = dict(re.findall(r"^(\d\.\d) +(\d\.\d+)\s*$", output(printed, "threshold"), re.M))
    assert rows == {"0.0": "1.0", "0.5": "1.0", "1.0": "0.0"}


def test_tools_config(work, printed):
    """The config block of the docs, as it stands, in a config file."""
    assert "Config is valid" in output(printed, "debug")
    assert "[S702] 'look_ahead'" in printed["debug wrong"][0]
    output(printed, "assemble")
    sam = spacy.load(work / "assembled").get_pipe("sam_ner")
    assert isinstance(sam, SamNer)
    assert sam.cfg["threshold"] == 0.25
    assert "registered.py" in output(printed, "function")
    assert "sam_ner" in output(printed, "info")


def test_docs_settings_are_those_of_the_factory():
    config, *_ = config_blocks(DOCS / "usage.md")
    assert config == {"components": {"sam_ner": {"factory": "sam_ner", **DEFAULT_CONFIG}}}
    assert set(DEFAULT_CONFIG) == set(inspect.signature(make_sam_ner).parameters) - {"nlp", "name"}
    assert set(DEFAULT_CONFIG) == set(inspect.signature(SamNer).parameters) - {"vocab", "name"}


def test_docs_settings_are_explained():
    block = re.findall(r"```ini\n(.*?)```", (DOCS / "usage.md").read_text("utf8"), re.S)[0]
    lines = block.splitlines()
    settings = [n for n, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    unexplained = [lines[n] for n in settings if not lines[n - 1].startswith("#")]
    assert unexplained == ['factory = "sam_ner"']


@pytest.mark.parametrize("page", ["usage.md", "vllm.md"])
def test_docs_blocks_can_be_copied(page):
    """They are what spaCy reads: a comment behind a value would become a part of it."""
    blocks = config_blocks(DOCS / page)
    assert blocks
    for config in blocks:
        for component in config["components"].values():
            assert component["factory"] in ("sam_ner", "llm")
        assert "#" not in json.dumps(config)
