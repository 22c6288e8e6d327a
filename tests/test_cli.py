"""The command line: help, output, exit codes. Engines and encoders are stand-ins; banks and files are real."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
import spacy
from fakes import FakeEngine
from helpers import ENCODER_DIMENSION, save_adapter
from spacy.tokens import DocBin
from typer.main import get_command
from typer.testing import CliRunner

import spacy_sam.cli.apply_command
import spacy_sam.cli.bank_commands
import spacy_sam.cli.commands
import spacy_sam.cli.show  # noqa: F401 (registers the commands)
from spacy_sam import evaluate as ev
from spacy_sam.bank import ExpertBank
from spacy_sam.cli import app
from spacy_sam.cli.app import find_files, read_overrides
from spacy_sam.corpora import Record
from spacy_sam.evaluate import gold_doc
from spacy_sam.plan import Plan

COMMANDS = [
    "train",
    "select",
    "merge",
    "evaluate",
    "report",
    "apply",
    "demo",
    "bank list",
    "bank show",
    "bank check",
    "bank add",
    "bank compress",
    "bank remove",
]
RECORDS = [
    Record("Anna met Omar in Bern.", ((0, 4, "person"), (9, 13, "person"), (17, 21, "place"))),
    Record("In Prague, Lena took the late ferry.", ((3, 9, "place"), (11, 15, "person"))),
    Record("Nobody came to the harbour.", ()),
]
TEXTS = [record.text for record in RECORDS]
Run = Callable[..., Any]


class FakeEncoder:
    """Embeds a text by its letters."""

    def __init__(self, name: str, *, path: Any = None) -> None:
        self.name = name

    def __call__(self, texts: List[str]) -> np.ndarray:
        return np.array(
            [[text.count(chr(97 + i)) for i in range(ENCODER_DIMENSION)] for text in texts], dtype=np.float32
        )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, with stand-ins for the engine and the encoder."""
    monkeypatch.setattr("spacy_sam.registered.TorchEngineMaker.__call__", lambda self, bank: FakeEngine())
    monkeypatch.setattr("spacy_sam.parts.SentenceEncoder", FakeEncoder)
    monkeypatch.setattr("spacy_sam.foreign.SentenceEncoder", FakeEncoder)
    runner = CliRunner()

    def run_command(*args: Any) -> Any:
        result = runner.invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run_command


def said(result: Any) -> str:
    """What a command printed, on one line."""
    return " ".join(result.output.split())


def write(path: Path, lines: List[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"text": record.text, "entities": record.entities} for record in RECORDS]
    return write(tmp_path / "towns.test.jsonl", [json.dumps(row) for row in rows])


@pytest.fixture
def plan_path(run: Run, corpus: Path, tiny_bank_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    assert run("select", corpus, "-b", tiny_bank_path, "-l", "person,place", "-o", path).exit_code == 0
    return path


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_help(run, command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: python -m spacy sam {command}" in said(result)
    assert len(result.output.splitlines()) < 40


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_help_examples_are_right(command):
    """The example in each help text has the command's arguments and no option that it does not know."""
    group: Any = get_command(app)
    found: Any = group
    for name in command.split():
        found = found.commands[name]
    (example,) = re.findall(r"Example: python -m spacy sam (.+)", str(found.help))
    words = shlex.split(example)[len(command.split()) :]
    found.make_context(command, words).close()


@pytest.mark.parametrize("args", [[], ["bank"]])
def test_cli_without_command_shows_help(run, args):
    result = run(*args)
    assert result.exit_code == 2
    for command in (
        ("list", "show", "check", "add", "compress", "remove")
        if args
        else ("train", "select", "merge", "evaluate", "report", "apply", "demo")
    ):
        assert command in result.output


@pytest.mark.parametrize(
    "args",
    [
        ["nothing"],
        ["bank", "nothing"],
        ["train"],
        ["train", "a.cfg"],
        ["train", "a.cfg", "out", "--steps", "5"],
        ["train", "a.cfg", "out", "--paths.data", "x", "y"],
        ["train", "a.cfg", "out", "y"],
        ["select"],
        ["select", "a.jsonl", "--nothing"],
        ["select", "a.jsonl", "--n-experts", "0"],
        ["merge", "plan.json"],
        ["evaluate"],
        ["evaluate", "a.jsonl", "--limit", "0"],
        ["evaluate", "a.jsonl", "--density", "1.5"],
        ["evaluate", "a.jsonl", "--scale", "much"],
        ["report", "a.jsonl"],
        ["bank", "add", "bank"],
        ["bank", "remove", "bank"],
    ],
)
def test_cli_wrong_usage(run, args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_cli_overrides():
    args = ["--paths.data", "some/where", "--training.seed", "3", "--base.kind=random", "--lora.alpha", "0.5"]
    expected = {"paths.data": "some/where", "training.seed": 3, "base.kind": "random", "lora.alpha": 0.5}
    assert read_overrides(args) == expected
    assert read_overrides([]) == {}
    assert args[0] == "--paths.data"


def test_cli_files(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl", "[x].jsonl"):
        write(tmp_path / name, [])
    monkeypatch.chdir(tmp_path)
    assert find_files([Path("b.jsonl"), Path("?.jsonl")]) == [Path("b.jsonl"), Path("a.jsonl"), Path("b.jsonl")]
    assert find_files([Path("[x].jsonl")]) == [Path("[x].jsonl")]


# As programs


def program(*args: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(arg) for arg in args], capture_output=True, text=True, check=False, timeout=240)


def test_cli_in_spacy(tmp_path):
    result = program(sys.executable, "-m", "spacy", "sam", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("train", "select", "merge", "evaluate", "report", "demo", "bank"):
        assert command in result.stdout
    failed = program(sys.executable, "-m", "spacy", "sam", "bank", "list", "--bank", tmp_path)
    assert failed.returncode == 1
    assert "[S101]" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr


def test_cli_script(tiny_bank_path):
    result = program(Path(sys.executable).with_name("spacy-sam"), "bank", "list", "--bank", tiny_bank_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "expert2" in result.stdout


# Select, merge, report


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".spacy", ".conll"])
def test_cli_select(run, tiny_bank_path, tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".jsonl":
        write(path, [json.dumps({"text": text}) for text in TEXTS])
    elif suffix == ".txt":
        write(path, TEXTS)
    elif suffix == ".spacy":
        nlp = spacy.blank("en")
        DocBin(docs=[gold_doc(nlp, record) for record in RECORDS]).to_disk(path)
    else:
        write(path, ["Anna B-person", "met O", "Omar B-person", "", "Prague B-place"])
    out = tmp_path / "new" / "plan.json"
    result = run("select", path, "--bank", tiny_bank_path, "--labels", " person, place ", "--output", out)
    assert result.exit_code == 0, result.output
    plan = Plan.from_disk(out)
    assert plan.labels == ("person", "place")
    assert plan.sample_size == (2 if suffix == ".conll" else 3)
    assert [selection.selector for selection in plan.selections] == ["domain_similarity", "sampling_evaluation"]
    for selection in plan.selections:
        assert selection.selector in result.output
        assert sorted(name for name, _ in selection.scores) == ["expert0", "expert1", "expert2"]
    assert plan.fingerprint in result.output
    assert "Task model 1: expert0 + expert1 + expert2" in said(result)


def test_cli_select_settings(run, corpus, tiny_bank_path, tmp_path):
    out = tmp_path / "plan.json"
    args = ["--n-experts", 2, "--density", 0.5, "--scale", 2]
    assert run("select", corpus, "-b", tiny_bank_path, "-l", "person", "-o", out, *args).exit_code == 0
    plan = Plan.from_disk(out)
    assert {len(spec.experts) for spec in plan.task_models} == {2}
    assert plan.task_models[0].method == {"@misc": "spacy_sam.TIES.v1", "density": 0.5, "scale": 2.0}


def test_cli_select_several_files_and_default_labels(run, corpus, tiny_bank_path, tmp_path):
    more = write(tmp_path / "more.txt", ["Petra sailed to Oslo."])
    out = tmp_path / "plan.json"
    assert run("select", corpus, more, "-b", tiny_bank_path, "-o", out).exit_code == 0
    plan = Plan.from_disk(out)
    assert (plan.sample_size, plan.labels) == (4, ("person", "place"))


def test_cli_merge(run, plan_path, tiny_bank_path, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("merge", plan_path, tmp_path / "merged", "-b", tiny_bank_path)
    assert result.exit_code == 0, result.output
    assert "expert0 + expert1 + expert2" in said(result)
    assert Plan.from_disk(tmp_path / "merged" / "plan.json") == Plan.from_disk(plan_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "task_model_1").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_bank_path / "base").state_dict()
    assert merged.keys() == base.keys()
    assert any(not merged[key].equal(base[key]) for key in base)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged" / "task_model_1").eos_token == "<|end|>"


def test_cli_merge_in_another_dtype_and_in_shards(run, plan_path, tiny_bank_path, tmp_path):
    from safetensors.torch import load_file

    options = ["--dtype", "bfloat16", "--max-shard-size", "0.00002"]
    result = run("merge", plan_path, tmp_path / "merged", "-b", tiny_bank_path, *options)
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "merged" / "task_model_1").glob("model-*.safetensors"))
    assert len(files) > 2
    assert {str(tensor.dtype) for file in files for tensor in load_file(file).values()} == {"torch.bfloat16"}
    result = run("merge", plan_path, tmp_path / "other", "-b", tiny_bank_path, "--dtype", "int8")
    assert "S502" in result.output
    assert not (tmp_path / "other").exists()


def test_cli_report(run, corpus, plan_path, tiny_bank_path, tmp_path):
    page = tmp_path / "new" / "page.html"
    result = run("report", corpus, page, "-b", tiny_bank_path, "--plan", plan_path, "--limit", 2)
    assert result.exit_code == 0, result.output
    html = page.read_text(encoding="utf8")
    assert "<h2>2 documents, 5 entities</h2>" in html
    assert "domain similarity" in html
    assert html.count("<mark") == 5
    assert "harbour" not in html


def test_cli_report_selects_without_a_plan(run, corpus, tiny_bank_path, tmp_path):
    result = run("report", corpus, tmp_path / "page.html", "-b", tiny_bank_path, "-l", "place")
    assert result.exit_code == 0, result.output
    html = (tmp_path / "page.html").read_text(encoding="utf8")
    assert "<h2>3 documents," in html
    assert "sampling evaluation" in html
    assert "person" not in html


def test_cli_report_asks_the_plan_s_labels(run, corpus, tiny_bank_path, tmp_path):
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    assert run("select", corpus, "-b", tiny_bank_path, "-l", "town", "-o", plan).exit_code == 0
    assert run("report", corpus, page, "-b", tiny_bank_path, "-p", plan).exit_code == 0
    html = page.read_text(encoding="utf8")
    assert "town" in html
    assert "person" not in html


def test_cli_demo(run, tiny_bank_path, tmp_path):
    result = run("demo", "-b", tiny_bank_path, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "Maria Holm" in result.output
    assert "Task model 1" in result.output
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["page_medicine.html", "page_politics.html"]


# Evaluate


def test_cli_evaluate(run, corpus, tiny_bank_path, tmp_path):
    out = tmp_path / "new" / "scores.json"
    result = run("evaluate", corpus, "-b", tiny_bank_path, "-o", out)
    assert result.exit_code == 0, result.output
    table = json.loads(out.read_text(encoding="utf8"))
    assert list(table) == ["towns.test"]
    rows = table["towns.test"]
    assert list(rows) == ["base", "expert0", "expert1", "expert2", "all merged", "SaM", "SaM-eco"]
    for row, scores in rows.items():
        assert list(scores) == ["p", "r", "f", "per_type", "task_models", "n_docs"]
        assert scores["n_docs"] == 3
        assert 0 <= scores["f"] <= 1
        assert all(list(prf) == ["p", "r", "f"] for prf in scores["per_type"].values())
        assert row in result.output
    assert rows["base"]["task_models"] == ["base"]
    assert rows["all merged"]["task_models"] == ["expert0 + expert1 + expert2"]
    assert rows["expert0"]["f"] > 0
    assert f"{100 * rows['expert0']['f']:.1f}" in result.output
    assert set(rows["expert0"]["per_type"]) == {"person", "place"}


def test_cli_evaluate_settings(run, corpus, tiny_bank_path, tmp_path):
    out = tmp_path / "scores.json"
    other = write(tmp_path / "other.jsonl", [json.dumps({"text": "Omar", "entities": [[0, 4, "person"]]})])
    args = ["--rows", "all, sam", "--n-experts", 1, "-n", 2, "--exclude", "place", "--per-type"]
    result = run("evaluate", corpus, other, "-b", tiny_bank_path, "-o", out, *args)
    assert result.exit_code == 0, result.output
    table = json.loads(out.read_text(encoding="utf8"))
    assert list(table) == ["towns.test", "other"]
    assert list(table["towns.test"]) == list(table["other"]) == ["all merged", "SaM"]
    assert table["towns.test"]["SaM"]["n_docs"] == 2
    assert table["other"]["SaM"]["n_docs"] == 1
    assert set(table["towns.test"]["SaM"]["per_type"]) == {"person"}
    assert all("+" not in name for name in table["towns.test"]["SaM"]["task_models"])
    assert "mean" in result.output
    assert "F1 by type" in result.output


def test_cli_evaluate_the_unified_baseline(run, corpus, bank_copy, tmp_path):
    from dataclasses import replace

    bank_copy.update_card(replace(bank_copy["expert2"], role="baseline"))
    args = ["--rows", "unified,experts"]
    assert run("evaluate", corpus, "-b", bank_copy.path, "-o", tmp_path / "s.json", *args).exit_code == 0
    (rows,) = json.loads((tmp_path / "s.json").read_text(encoding="utf8")).values()
    assert list(rows) == ["expert2", "expert0", "expert1"]


def test_cli_evaluate_corpora_of_the_same_name(run, tiny_bank_path, tmp_path):
    """Two files of one name are two corpora; patterns are expanded here if the shell did not."""
    for number, folder in enumerate(("a", "b"), 1):
        (tmp_path / folder).mkdir()
        row = json.dumps({"text": "Omar", "entities": [[0, 4, "person"]]})
        write(tmp_path / folder / "dev.jsonl", [row] * number)
    out = tmp_path / "scores.json"
    result = run("evaluate", tmp_path / "*" / "dev.jsonl", "-b", tiny_bank_path, "-o", out, "--rows", "base")
    assert result.exit_code == 0, result.output
    table = json.loads(out.read_text(encoding="utf8"))
    assert [rows["base"]["n_docs"] for rows in table.values()] == [1, 2]
    assert list(table) == [str(tmp_path / folder / "dev.jsonl") for folder in ("a", "b")]


# The bank


def test_cli_bank_list(run, bank_copy):
    result = run("bank", "list", "-b", bank_copy.path)
    assert result.exit_code == 0
    assert bank_copy.base_hash in result.output
    assert re.search(r"expert1\s+expert\s+1\s+2\s+50\.0", result.output)


def test_cli_bank_check_add_remove(run, bank_copy, tiny_bank_path):
    path = bank_copy.path
    assert "expert0, expert1, expert2" in said(run("bank", "check", "-b", path))
    assert run("bank", "remove", path, "expert1").exit_code == 0
    assert [card.name for card in ExpertBank(path)] == ["expert0", "expert2"]
    result = run("bank", "add", path, "fresh", tiny_bank_path / "experts" / "expert1")
    assert result.exit_code == 0, result.output
    assert ExpertBank(path)["fresh"].domain == "domain1"
    assert "expert0, expert2, fresh" in said(run("bank", "check", "-b", path))


def test_cli_bank_add_of_an_adapter_made_elsewhere(run, bank_copy, corpus, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bank_copy.path / "base", use_rslora=True)
    add = ["bank", "add", bank_copy.path, "towns", adapter, "--domain", "towns and people", "--texts", corpus]
    assert run(*add).exit_code == 0
    card = ExpertBank(bank_copy.path)["towns"]
    assert (card.domain, card.labels, card.centroid.n_texts) == ("towns and people", ("person", "place"), 3)
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**named, "base_model_name_or_path": "some/model"}))
    add[3] = "again"
    result = run(*add, "-l", "town")
    assert result.exit_code == 1
    assert "S119" in result.output
    assert "--same-base" in result.output
    assert run(*add, "-l", "town", "--same-base").exit_code == 0
    assert ExpertBank(bank_copy.path)["again"].labels == ("town",)


def test_cli_bank_compress(run, bank_copy, tmp_path):
    result = run("bank", "compress", bank_copy.path, tmp_path / "small", "--bits", 4)
    assert result.exit_code == 0, result.output
    assert re.search(r"expert1\s+0\.\d\d\d", result.output)
    assert "expert0, expert1, expert2" in said(run("bank", "check", "-b", tmp_path / "small"))


# What the user can mend


def problems(tmp_path: Path, bank: Path) -> Dict[str, List[Any]]:
    """Commands that fail, by the code and what else the message must say."""
    rows = [json.dumps({"text": text, "entities": []}) for text in TEXTS]
    good = write(tmp_path / "good.jsonl", rows)
    broken = write(tmp_path / "broken.jsonl", [*rows, '{"text": "Anna"'])
    no_text = write(tmp_path / "no_text.jsonl", [rows[0], '{"entities": []}'])
    outside = write(tmp_path / "outside.jsonl", [rows[0], "", '{"text": "Anna", "entities": [[0, 9, "x"]]}'])
    tags = write(tmp_path / "tags.conll", ["Anna B-person", "met Q"])
    strange = write(tmp_path / "strange.csv", ["a,b"])
    empty = write(tmp_path / "empty.txt", [])
    damaged = write(tmp_path / "damaged.json", ["{"])
    config = write(tmp_path / "train.cfg", ["[base]", 'kind = "magic"'])
    b = ["-b", bank]
    return {
        "S101 bank.json": ["bank", "check", "-b", tmp_path / "nowhere"],
        "S101 nowhere": ["select", good, "-b", tmp_path / "nowhere"],
        "S102 card.json": ["bank", "add", bank, "new", make_folder(tmp_path / "adapter", "card.json", "{")],
        "S104 card.json": ["bank", "add", bank, "new", tmp_path / "no_adapter"],
        "S108 expert0": ["bank", "remove", bank, "nobody"],
        "S109 expert0": ["bank", "add", bank, "expert0", bank / "experts" / "expert0"],
        "S111 no_plan.json": ["merge", tmp_path / "no_plan.json", tmp_path / "merged", *b],
        "S111 Expecting": ["report", good, tmp_path / "page.html", "-p", damaged, *b],
        "S114 ../x": ["bank", "add", bank, "../x", bank / "experts" / "expert0"],
        "S203 semicolon": ["select", good, "-l", "a;b", *b],
        "S601 no such file": ["train", tmp_path / "nothing.cfg", tmp_path / "out"],
        "S601 base.kind": ["train", config, tmp_path / "out"],
        "S602 missing.jsonl": ["select", tmp_path / "missing.jsonl", *b],
        "S602 strange.csv": ["evaluate", strange, *b],
        "S602 *.bio": ["evaluate", tmp_path / "*.bio", *b],
        "S603 broken.jsonl, line 4": ["evaluate", broken, *b],
        "S603 broken.jsonl, line 4: not a JSON object": ["select", broken, *b],
        "S603 no_text.jsonl, line 2": ["report", no_text, tmp_path / "page.html", *b],
        "S603 outside.jsonl, line 3": ["evaluate", outside, *b],
        "S603 tags.conll, line 2": ["evaluate", tags, *b],
        "S801 empty.txt": ["select", empty, *b],
        "S802 --domain and --texts": ["bank", "add", bank, "new", bank / "experts" / "expert0", "--domain", "x"],
        "S802 has no 'card.json'": ["bank", "add", bank, "new", bank / "experts"],
        "S117 another folder": ["bank", "compress", bank, bank],
        "S205 bits": ["bank", "compress", bank, tmp_path / "small", "--bits", "0"],
        "S802 Unknown rows ['everything']": ["evaluate", good, "--rows", "base,everything", *b],
    }


def make_folder(folder: Path, name: str, content: str) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / name, [content])
    return folder


def test_cli_coded_errors(run, tmp_path, bank_copy):
    for expected, args in problems(tmp_path, bank_copy.path).items():
        code, _, part = expected.partition(" ")
        result = run(*args)
        assert result.exit_code == 1, (args, result.output)
        assert f"[{code}]" in said(result), args
        assert part in said(result), args
        assert "Traceback" not in result.output
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "page.html").exists()
    assert not (tmp_path / "out").exists()
    assert bank_copy.check() == ["expert0", "expert1", "expert2"]


def test_cli_plan_of_another_bank(run, plan_path, tmp_path, bank_copy):
    from helpers import make_tiny_bank

    other = make_tiny_bank(tmp_path / "other", n_experts=1, seed=9)
    for args in (
        ["merge", plan_path, tmp_path / "merged"],
        ["report", plan_path.with_name("towns.test.jsonl"), "p.html"],
    ):
        extra = ["-p", plan_path] if args[0] == "report" else []
        result = run(*args, *extra, "-b", other.path)
        assert result.exit_code == 1
        assert "[S112]" in result.output


def test_cli_rows_match_the_package(run):
    """`--rows` names what `evaluate` knows by default."""
    group: Any = get_command(app)
    (option,) = (param for param in group.commands["evaluate"].params if param.name == "rows")
    assert tuple(option.default.split(",")) == ev.ROWS
