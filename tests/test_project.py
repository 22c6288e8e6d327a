"""The spaCy project: its demo workflow from end to end, skipping, its documentation, its scripts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import spacy
import srsly
from spacy.tokens import DocBin
from transformers import AutoModelForCausalLM

from spacy_sam.bank import ExpertBank
from spacy_sam.corpora import read_records
from spacy_sam.plan import Plan

ROOT = Path(__file__).parents[1]
STEPS = ["prepare", "train", "select", "merge", "evaluate", "report"]
FEW_STEPS = {"[base_training.demo]": 6, "[expert_training]": 3, "[unified_training]": 3}
LIMIT = 8


def python(folder: Path, *args: Any, timeout: int = 280) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout)


def copy_project(folder: Path) -> Path:
    for name in ("scripts", "configs", "assets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "project.yml", folder)
    return folder


def quick_config(text: str) -> str:
    """The demo's config with few steps."""
    lines: List[str] = []
    section = ""
    for line in text.splitlines():
        section = line if line.startswith("[") else section
        if line.startswith("max_steps") and section in FEW_STEPS:
            lines.append(f"max_steps = {FEW_STEPS[section]}")
        elif line.startswith("dev_texts"):
            lines.append(f"dev_texts = {LIMIT}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a config of few steps, nothing run yet."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    text = (folder / "configs" / "demo.cfg").read_text(encoding="utf8")
    (folder / "configs" / "quick.cfg").write_text(quick_config(text), encoding="utf8")
    return folder


def run_demo(project: Path, *args: Any) -> "subprocess.CompletedProcess[str]":
    settings = ["--vars.config", "quick", "--vars.limit", LIMIT]
    return python(project, "-m", "spacy", "project", "run", "demo", ".", *settings, *args)


@pytest.fixture(scope="module")
def work(project: Path) -> Path:
    """The demo's folder after a run."""
    result = run_demo(project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not [step for step in STEPS if f"Skipping '{step}'" in result.stdout]
    return project / "runs" / "demo"


def test_project_bank(work):
    bank = ExpertBank(work / "bank")
    assert bank.check() == ["cooking", "shipping", "sport", "unified"]
    assert [card.name for card in bank.experts] == ["cooking", "shipping", "sport"]
    for card in [*bank.experts, *bank.baselines]:
        assert {score.n_docs for score in card.scores.values()} == {LIMIT}
    assert sorted(bank["unified"].scores) == ["cooking", "shipping", "sport"]


def test_project_plan_and_merged_models(work):
    plan = Plan.from_disk(work / "plan.json")
    assert plan.base_hash == ExpertBank(work / "bank").base_hash
    assert plan.labels == ("dish", "ingredient", "port", "ship")
    assert all(len(spec.experts) == 2 for spec in plan.task_models)
    assert Plan.from_disk(work / "merged" / "plan.json") == plan
    for number in range(1, len(plan.task_models) + 1):
        model = AutoModelForCausalLM.from_pretrained(work / "merged" / f"task_model_{number}")
        assert model.num_parameters() > 0


def test_project_domain_similarity_finds_the_domains_of_the_target(work):
    """The target's sentences are of cooking and shipping; that is known without any training."""
    (similarity,) = (s for s in Plan.from_disk(work / "plan.json").selections if s.selector == "domain_similarity")
    assert set(similarity.chosen) == {"cooking", "shipping"}


def test_project_scores(work):
    table = json.loads((work / "scores.json").read_text(encoding="utf8"))
    assert list(table) == ["galley.test"]
    rows = table["galley.test"]
    assert list(rows) == ["base", "unified", "cooking", "shipping", "sport", "all merged", "SaM", "SaM-eco"]
    assert {row["n_docs"] for row in rows.values()} == {LIMIT}


def test_project_page(work):
    html = (work / "page.html").read_text(encoding="utf8")
    assert f"<h2>{LIMIT} documents, " in html
    assert html.count('class="entities"') == LIMIT
    assert "domain similarity" in html
    assert "<script" not in html
    assert "http" not in html


def test_project_skips_what_is_done(project, work):
    """A second run does nothing; a changed variable runs what depends on it, and nothing else."""
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    result = run_demo(project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [step for step in STEPS if f"Skipping '{step}'" in result.stdout] == STEPS
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
    dry = run_demo(project, "--vars.labels", "dish,port", "--dry")
    assert [step for step in STEPS if f"Skipping '{step}'" not in dry.stdout] == ["select", "report"]


def test_project_document(project):
    result = python(project, "-m", "spacy", "project", "document", "--output", "x.md")
    assert result.returncode == 0, result.stdout + result.stderr
    text = (project / "x.md").read_text(encoding="utf8")
    for name in (*STEPS, "demo", "bank", "train-bank", "clean"):
        assert f"`{name}`" in text


def test_project_file():
    """Every path that a step needs is another step's output or a file of the repository; every variable is used."""
    text = (ROOT / "project.yml").read_text(encoding="utf8")
    data: Dict[str, Any] = srsly.yaml_loads(text)
    commands = {command["name"]: command for command in data["commands"]}
    assert set(commands) == {name for steps in data["workflows"].values() for name in steps} | {"clean"}
    for steps in data["workflows"].values():
        made: List[str] = []
        for name in steps:
            for dep in commands[name].get("deps", []):
                assert (
                    dep in made
                    or (ROOT / dep).exists()
                    or dep
                    in (
                        "${vars.raw}",
                        "configs/${vars.config}.cfg",
                        "configs/${vars.bank_config}.cfg",
                    )
                ), (name, dep)
            made += commands[name].get("outputs", []) + commands[name].get("outputs_no_cache", [])
    assert all(f"${{vars.{name}}}" in text for name in data["vars"])
    # weasel glues an entry that is a variable alone to the next one
    lists = [command.get(key, []) for command in data["commands"] for key in ("deps", "outputs", "outputs_no_cache")]
    assert not [
        entry for entries in lists if len(entries) > 1 for entry in entries if re.fullmatch(r"\$\{\S+\}", entry)
    ]


def test_project_demo_corpora_are_what_the_script_writes(tmp_path):
    result = python(ROOT, "scripts/make_demo_corpora.py", tmp_path / "new")
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (ROOT / "assets" / "demo").iterdir())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (ROOT / "assets" / "demo" / name).read_bytes()


def test_project_demo_corpora():
    """No sentence is in two corpora, entities have no space around them, and the target's types are of two sources."""
    seen: List[str] = []
    labels: Dict[str, set] = {}
    for path in sorted((ROOT / "assets" / "demo").iterdir()):
        records = read_records(path)
        seen += [record.text for record in records]
        found = labels.setdefault(path.name.split(".")[0], set())
        for record in records:
            for start, end, label in record.entities:
                assert record.text[start:end] == record.text[start:end].strip() != ""
                found.add(label)
        if path.name.endswith(".train.jsonl"):
            assert any(not record.entities for record in records)
    assert len(set(seen)) == len(seen)
    assert labels["galley"] == {"dish", "ingredient", "port", "ship"}
    assert labels["galley"] <= labels["cooking"] | labels["shipping"]
    assert not labels["galley"] & labels["sport"]


def test_project_prepare(tmp_path):
    """JSONL and CoNLL become DocBins, in the same folders; documents without entities are annotated as such."""
    rows = [
        {"text": "Ann is in Bern.", "entities": [[0, 3, "person"], [10, 14, "place"]]},
        {"text": "Nobody is here.", "entities": []},
        {"text": "From Bernside to Kyoto", "entities": [[5, 9, "place"], [17, 22, "place"], [17, 22, "city"]]},
    ]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in" / "towns.dev.jsonl").write_text(lines, encoding="utf8")
    (tmp_path / "in" / "deep" / "tags.conll").write_text("Ann\tB-person\nleft\tO\n\nNo\tO\n", encoding="utf8")
    (tmp_path / "in" / "notes.md").write_text("Not a corpus.", encoding="utf8")
    result = python(ROOT, "scripts/prepare.py", tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    counts = json.loads((tmp_path / "out" / "counts.json").read_text(encoding="utf8"))
    assert list(counts) == ["deep/tags", "towns.dev"]
    towns = counts["towns.dev"]
    assert (towns["texts"], towns["without_entities"], towns["entities"], towns["moved"]) == (3, 1, 5, 2)
    assert towns["labels"] == {"city": 1, "person": 1, "place": 3}
    assert counts["deep/tags"]["labels"] == {"person": 1}
    docs = list(DocBin().from_disk(tmp_path / "out" / "towns.dev.spacy").get_docs(spacy.blank("en").vocab))
    assert [doc.text for doc in docs] == [row["text"] for row in rows]
    assert [[(ent.text, ent.label_) for ent in doc.ents] for doc in docs][:2] == [
        [("Ann", "person"), ("Bern", "place")],
        [],
    ]
    assert all(doc.has_annotation("ENT_IOB") for doc in docs)
    assert (tmp_path / "out" / "deep" / "tags.spacy").is_file()


def test_project_prepare_checks(tmp_path):
    """`--check` writes the counts alone, and they change with the data; broken data is named with its line."""
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    hashes = []
    for text in ("one", "two"):
        path.write_text(json.dumps({"text": text, "entities": []}), encoding="utf8")
        result = python(ROOT, "scripts/prepare.py", tmp_path / "in", tmp_path / "out", "--check", "--files", "*.jsonl")
        assert result.returncode == 0, result.stdout + result.stderr
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["counts.json"]
        hashes.append(json.loads((tmp_path / "out" / "counts.json").read_text(encoding="utf8"))["a"]["sha256"])
    assert hashes[0] != hashes[1]
    path.write_text('{"text": "a", "entities": []}\n{"text": "b"}\n', encoding="utf8")
    for args in ([tmp_path / "in", tmp_path / "out"], [tmp_path / "in", tmp_path / "out", "--files", "*.conll"]):
        result = python(ROOT, "scripts/prepare.py", *args)
        assert result.returncode == 1
        assert "Traceback" not in result.stdout + result.stderr
        assert ("line 2" if len(args) == 2 else "*.conll") in result.stdout


def test_project_clean(tmp_path):
    (tmp_path / "project" / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    script = ROOT / "scripts" / "clean.py"
    for folder in ("../other", ".", tmp_path):
        assert python(tmp_path / "project", script, folder).returncode == 2
    assert (tmp_path / "other").is_dir()
    assert python(tmp_path / "project", script, "runs/demo").returncode == 0
    assert not (tmp_path / "project" / "runs" / "demo").exists()
    assert python(tmp_path / "project", script, "runs/demo").returncode == 0
