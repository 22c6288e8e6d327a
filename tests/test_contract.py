"""spaCy's contract with a component, in one process, in forked workers and in spawned ones.

More of it for one process is in test_component.py (streams, plans, failures) and test_settings.py (labels, saving), with a
real engine in forked workers in test_processes.py. The cases themselves are in contract.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import spacy
from fakes import plan_of
from pipelines import LABELS, TEXTS, add_sam, ents, group, make_nlp, names_in, raises, sam_of
from remembering import REMEMBERED, REMEMBERED_LABELS
from spacy.language import Language

import spacy_sam
from spacy_sam.bank import ExpertBank

TESTS = Path(__file__).parent
PACKAGE = Path(spacy_sam.__file__).parents[1]
MODES = {"single": ("fork", 1), "fork": ("fork", 2), "spawn": ("spawn", 2)}
# All cases of a mode run in the first of its tests; each case has its own limit.
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and sets alarms"),
    pytest.mark.timeout(1600),
]
in_each_mode = pytest.mark.parametrize("mode", ["single", "fork", pytest.param("spawn", marks=pytest.mark.slow)])


def python(*arguments: Any, timeout: int = 280, path: Any = (), **variables: str) -> str:
    """What a Python process prints. path: More folders to import from."""
    paths = os.pathsep.join(map(str, [*path, PACKAGE]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tiny_bank_path) -> Callable[[str], Dict[str, Any]]:
    """The results of all cases in one mode; every mode runs once."""
    known: Dict[str, Dict[str, Any]] = {}

    def run(mode: str) -> Dict[str, Any]:
        if mode not in known:
            known[mode] = {}  # a mode that fails is not run again
            method, n_process = MODES[mode]
            out = python(TESTS / "contract.py", method, n_process, tiny_bank_path, timeout=1500, path=[TESTS])
            known[mode] = json.loads(out.splitlines()[-1])
        return known[mode]

    return run


@pytest.fixture
def result(request, results) -> Any:
    """The result of the case that the test is named after."""
    case = request.node.originalname.removeprefix("test_contract_")
    mode = request.node.callspec.params["mode"]
    if mode == "spawn" and case in ("empty_stream", "failing_documents_warn", "memory_zones"):
        pytest.skip("nothing of it is pickled")
    found = results(mode)[case]
    assert not isinstance(found, dict) or "failed" not in found, found["failed"]
    return found


@in_each_mode
def test_contract_order_and_contexts(result, mode):
    assert result["texts"]
    assert result["contexts"]
    assert result["same"] or mode != "single"  # other processes send copies
    assert result["ents"] == result["wanted"]
    assert any(result["ents"])


@in_each_mode
def test_contract_empty_stream(result, mode):
    assert result == 0


@in_each_mode
def test_contract_early_close(result, mode):
    wanted = [[list(span) for span in names_in(TEXTS[n % len(TEXTS)])] for n in range(7)]
    assert result["found"] == wanted
    # spaCy itself sends ten batches ahead to each worker, and asks for more as documents come back
    assert 7 <= result["pulled"] <= (9 if mode == "single" else 2 * 2 * 10 * 3)
    assert result["again"] == len(TEXTS)


@in_each_mode
def test_contract_interleaved_streams(result, mode):
    assert result == {"rows": len(TEXTS), "plans": True, "kept": True}


@in_each_mode
def test_contract_call_settings(result, mode):
    """expert1 overlooks the B; Zanzibar's score is 1/8."""
    assert result["call"] == [["Anna", "WHO"], ["Zoe", "WHO"]]
    assert [text for text, _ in result["after"]] == ["Anna", "Bella", "Zoe", "Zanzibar"]
    assert {label for _, label in result["after"]} == set(LABELS)
    assert result["kept"]


def check_failures(result: Dict[str, Any]) -> None:
    failed = [f"{TEXTS[1]} BOOM 1", f"{TEXTS[1]} BOOM 6"]
    assert result["contexts"] == [n for n in range(10) if n not in (1, 6)]
    assert result["whole"]
    assert result["got"] == [["sam_ner", [text], "the engine fell over"] for text in failed]


@in_each_mode
def test_contract_failing_documents(result, mode):
    check_failures(result)
    assert result["warned"] == 0


@in_each_mode
def test_contract_failing_documents_warn(result, mode):
    check_failures(result)
    assert result["warned"] == (2 if mode == "single" else 0)  # workers warn in their own process


@in_each_mode
def test_contract_failing_document_raises(result, mode):
    assert "the engine fell over" in result["error"]
    assert result["next"] == len(TEXTS)


@in_each_mode
def test_contract_memory_zones(result, mode):
    labels = [[label for _, _, label in names_in(text)] for text in TEXTS[:2]]
    assert result["found"] == [labels] * 3
    assert result["kept"]
    assert result["engines"] == (1 if mode == "single" else 0)


@in_each_mode
def test_contract_existing_entities(result, mode):
    assert result == [[["Anna Bell", "OLD"], ["Carl", "person"], "Q1", ["met"]]] * 4


@in_each_mode
def test_contract_without_a_plan(result, mode):
    if mode == "single":
        assert result is True
    else:
        assert "[S703]" in result


@in_each_mode
def test_contract_cuda_model_of_the_parent(result, mode):
    """A forked worker cannot use it and says so; a spawned one loads its own."""
    if mode == "fork":
        assert "[S504]" in result
    else:
        assert result is True


# Settings of a call


def test_call_settings_are_checked(make_case):
    nlp, sam, _ = make_case()
    for settings, code in (
        ({"threshold": 1.5}, "S702"),
        ({"threshold": "0.5"}, "S702"),
        ({"labels": "person"}, "S202"),
        ({"labels": ["a;b"]}, "S203"),
        ({"plan": "plan.json"}, "S706"),
    ):
        with raises(code):
            list(nlp.pipe(TEXTS, component_cfg={"sam_ner": settings}))
        with raises(code):
            nlp(TEXTS[0], component_cfg={"sam_ner": settings})
    assert sam.plan is None
    assert sam.parts.make_engine.made == []


def test_call_labels_decide_selection(make_case):
    case = make_case(min_docs=1)
    docs = list(case.nlp.pipe(TEXTS, component_cfg={"sam_ner": {"labels": {"WHO": "someone"}}}))
    assert [ents(doc) for doc in docs] == [names_in(text, labels=["WHO"]) for text in TEXTS]
    assert [context.labels for context in case.sam.parts.strategy.contexts] == [("someone",)]
    assert case.sam.labels == tuple(LABELS)


def test_call_empty_labels_are_those_of_the_component(make_case):
    nlp, sam, bank = make_case()
    doc = sam(nlp.make_doc(TEXTS[0]), plan=plan_of(bank, "expert0"), labels=[])
    assert ents(doc) == names_in(TEXTS[0])


def test_settings_changed_at_run_time_are_checked(make_case):
    nlp, sam, bank = make_case()
    sam.plan = plan_of(bank, "expert0")
    sam.cfg["threshold"] = 0.21
    assert [ent.text for ent in nlp("Bo Anna Bella").ents] == ["Bo", "Anna"]
    sam.cfg["threshold"] = "0.5"
    with raises("S702"):
        nlp("Anna")
    with raises("S702"):
        list(nlp.pipe(["Anna"]))


# Saving


def load(path: Path, **config: Any) -> Language:
    return spacy.load(path, config={"components": {"sam_ner": config}})


def test_saved_settings_can_be_overridden(make_case, tmp_path):
    """`spacy.load` builds the component with its `config`, which what was saved must not undo."""
    case = make_case(labels=["person"], selection="once")
    case.sam.plan = plan_of(case.bank, "expert1")
    case.sam.add_label("place")
    case.sam.cfg["batch_size"] = 7
    case.nlp.to_disk(tmp_path / "model")
    loaded = sam_of(load(tmp_path / "model", threshold=0.5))
    assert loaded.cfg == {**case.sam.cfg, "threshold": 0.5}
    assert loaded.plan == case.sam.plan
    assert sam_of(load(tmp_path / "model", labels=["river"])).labels == ("river",)
    again = load(tmp_path / "model", batch_size=9)
    again.to_disk(tmp_path / "again")
    for nlp in (again, spacy.load(tmp_path / "again")):
        assert sam_of(nlp).cfg == {**case.sam.cfg, "batch_size": 9}


def test_saved_bank_moves_with_the_pipeline(bank_copy, tmp_path):
    nlp, sam = make_nlp(bank_copy, save_bank=True, selection="once")
    sam.plan = plan_of(bank_copy, "expert1")
    nlp.to_disk(tmp_path / "here")
    nlp.to_disk(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(bank_copy.path)
    loaded = spacy.load(tmp_path / "there")
    files = sorted(path.name for path in (tmp_path / "there" / "sam_ner").iterdir())
    assert files == ["bank", "cfg.json", "plan.json"]
    assert [group(doc) for doc in loaded.pipe(TEXTS)] == [names_in(text, 1) for text in TEXTS]
    loaded.to_disk(tmp_path / "there")  # onto itself
    loaded.to_disk(tmp_path / "third")
    assert ents(spacy.load(tmp_path / "third")(TEXTS[0])) == ents(loaded(TEXTS[0])) == names_in(TEXTS[0], 1)


def test_saved_bank_can_be_overridden(bank_copy, tiny_bank_path, tmp_path):
    nlp, _ = make_nlp(bank_copy, save_bank=True)
    nlp.to_disk(tmp_path / "model")
    loaded = sam_of(load(tmp_path / "model", bank=str(tiny_bank_path)))
    assert loaded.parts.bank.path == tiny_bank_path


def test_saved_bank_with_a_base_elsewhere(bank_copy, tmp_path):
    shutil.move(bank_copy.path / "base", tmp_path / "base")
    file = bank_copy.path / "bank.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base": str(tmp_path / "base")}))
    nlp, _ = make_nlp(ExpertBank(bank_copy.path), save_bank=True)
    with raises("S707"):
        nlp.to_disk(tmp_path / "model")
    assert not (tmp_path / "model" / "sam_ner" / "bank").exists()


OFFLINE = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise OSError("this test has no network")

socket.socket.connect = socket.getaddrinfo = refuse
import spacy
nlp = spacy.load(sys.argv[1])
docs = nlp.pipe(json.loads(sys.argv[2]))
print(json.dumps([[[e.start_char, e.end_char, e.label_] for e in doc.ents] for doc in docs]))
"""


def remembering_pipeline(bank: ExpertBank, folder: Path) -> None:
    """Save a pipeline with a real engine, a plan and its bank."""
    nlp = spacy.blank("en")
    sam = add_sam(
        nlp,
        bank=str(bank.path),
        labels=list(REMEMBERED_LABELS),
        selection="once",
        save_bank=True,
        strategy={"selectors": {"similarity": None}},
        engine={"device": "cpu"},
    )
    sam.plan = plan_of(bank, "expert0", "expert1")
    nlp.to_disk(folder)


def test_saved_pipeline_moved_and_loaded_offline(remembering_bank, tmp_path):
    remembering_pipeline(remembering_bank, tmp_path / "here")
    (tmp_path / "other").mkdir()
    moved = shutil.move(tmp_path / "here", tmp_path / "other" / "there")
    out = python("-c", OFFLINE, moved, json.dumps(list(REMEMBERED)), HF_HOME=str(tmp_path / "no_cache"))
    found: List[Any] = json.loads(out.splitlines()[-1])
    assert found == [[list(span) for span in spans] for spans in REMEMBERED.values()]


@pytest.mark.slow
def test_package_installed_elsewhere(remembering_bank, tmp_path):
    """`spacy package`, pip install into a fresh environment, load by name; the original pipeline and bank are not used."""
    remembering_pipeline(remembering_bank, tmp_path / "model")
    (tmp_path / "packages").mkdir()
    python("-m", "spacy", "package", tmp_path / "model", tmp_path / "packages", "--name", "known", "--version", "1.2.3")
    shutil.rmtree(tmp_path / "model")
    meta = json.loads((tmp_path / "packages" / "en_known-1.2.3" / "meta.json").read_text(encoding="utf8"))
    assert any(requirement.startswith("spacy-sam>=") for requirement in meta["requirements"])
    (archive,) = (tmp_path / "packages").glob("*/dist/*.tar.gz")
    python("-m", "venv", "--without-pip", tmp_path / "env")
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # The packages of this environment, behind those of the fresh one: there is no index to install them from.
    (site / "these.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")), encoding="utf8")
    fresh = tmp_path / "env" / "bin" / "python"
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation"]
    python("-m", "pip", "--python", fresh, "install", *options, archive)
    code = f"import spacy; nlp = spacy.load('en_known'); print([e.text for e in nlp({next(iter(REMEMBERED))!r}).ents])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [str(fresh), "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.stdout == "['Lena', 'Jakob', 'Prague']\n", done.stderr
