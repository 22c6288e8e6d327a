"""The component in other processes: workers of nlp.pipe, spawned or forked, and fresh interpreters.

Everything runs in a subprocess with a timeout, so that a hang is a failure and not a hang of the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

import spacy_sam

TESTS = Path(__file__).parent
TIMEOUT = 240

SCRIPT = """
import json, multiprocessing, sys, threading, warnings
import spacy, torch
from fakes import plan_of
from spacy_sam.bank import ExpertBank

FAKES = {"engine": {"@misc": "sam_tests.FakeEngine.v1"}, "strategy": {"@misc": "sam_tests.FakeStrategy.v1"}}
TEXTS = [f"Bella {n} met Cora and Anna ." for n in range(12)]

def make_nlp(bank, **config):
    nlp = spacy.blank("en")
    sam = nlp.add_pipe("sam_ner", config={"bank": bank, "labels": ["person", "place"], "min_docs": 2, **config})
    return nlp, sam

def found(docs):
    docs = list(docs)
    spans = [[(s.start_char, s.end_char, s.label_) for s in doc.spans["sc"]] for doc in docs]
    plans = {doc.spans["sc"].attrs["plan"] for doc in docs}
    ents = [[(e.start_char, e.end_char, e.label_) for e in doc.ents] for doc in docs]
    return {"texts": [doc.text for doc in docs], "spans": spans, "ents": ents, "plans": sorted(plans)}

def ignore(name, component, docs, error):
    "An error handler as spaCy has them: the failing documents are left out, and the test counts those that remain."

def fork(bank):
    "A real engine, used in the parent with several torch threads: the workers must not wait for those."
    from remembering import REMEMBERED

    torch.set_num_threads(2)
    nlp, sam = make_nlp(
        bank,
        engine={"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu"},
        strategy={"selectors": {"similarity": None}},
    )
    texts = list(REMEMBERED) * 3
    plan = sam.select(texts)
    single = found(nlp.pipe(texts))
    multi = found(nlp.pipe(texts, n_process=2, batch_size=3))
    return {"single": single, "multi": multi, "plan": plan.fingerprint, "after": sam.plan.fingerprint}

def busy(bank):
    "Another thread holds the engine's lock, in the middle of its work, whenever workers are forked."
    engine = {"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu", "max_new_tokens": 24}
    nlp, sam = make_nlp(bank, engine=engine, selection="manual")
    opened = sam.bank
    sam.plan = plan_of(opened, "expert0")
    texts = TEXTS[:4]
    single = found(nlp.pipe(texts))
    other, stop = plan_of(opened, "expert1", "expert2"), threading.Event()

    def annotate():
        while not stop.is_set():
            list(nlp.pipe(texts, component_cfg={"sam_ner": {"plan": other}}))

    thread = threading.Thread(target=annotate, daemon=True)
    thread.start()
    multi = [found(nlp.pipe(texts, n_process=2, batch_size=2)) for _ in range(3)]
    stop.set()
    thread.join()
    return {"single": single, "multi": multi, "after": found(nlp.pipe(texts))}

def fakes(bank):
    nlp, sam = make_nlp(bank, **FAKES)
    sam.plan = plan_of(ExpertBank(bank), "expert1")
    nlp.set_error_handler(ignore)
    texts = [text + (" BOOM" if n in (4, 7) else "") for n, text in enumerate(TEXTS)]
    pairs = list(nlp.pipe(zip(texts, range(12)), as_tuples=True, n_process=2, batch_size=3))
    return {**found([doc for doc, _ in pairs]), "contexts": [context for _, context in pairs]}

def no_plan(bank):
    nlp, sam = make_nlp(bank, **FAKES)
    try:
        list(nlp.pipe(TEXTS, n_process=2, batch_size=3))
    except Exception as error:
        return {"error": str(error)}

if __name__ == "__main__":
    mode, method, bank = sys.argv[1:]
    multiprocessing.set_start_method(method)
    print(json.dumps(globals()[mode](bank)))
"""


def run(*arguments: str) -> str:
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def script(tmp_path) -> Any:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)

    def run_mode(mode: str, method: str, bank: Path) -> Dict[str, Any]:
        return json.loads(run(str(file), mode, method, str(bank)).splitlines()[-1])

    return run_mode


fork_only = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@fork_only
def test_forked_workers_do_as_one_process_does(script, remembering_bank):
    result = script("fork", "fork", remembering_bank.path)
    assert result["multi"] == result["single"]
    assert result["multi"]["plans"] == [result["plan"]]
    assert result["after"] == result["plan"]
    assert sum(map(len, result["multi"]["ents"])) == 3 * 6


@fork_only
def test_forked_workers_while_other_threads_annotate(script, tiny_bank_path):
    """They wait for no lock of the parent's threads, and have no task model that was half-written at the fork."""
    result = script("busy", "fork", tiny_bank_path)
    assert result["multi"] == [result["single"]] * 3
    assert result["after"] == result["single"]
    assert sum(map(len, result["single"]["ents"])) > 0


def check_fakes(result: Dict[str, Any]) -> None:
    """All but the failing documents, in order, by the plan of the parent."""
    good = [n for n in range(12) if n not in (4, 7)]
    assert result["contexts"] == good
    assert result["texts"] == [f"Bella {n} met Cora and Anna ." for n in good]
    assert len(result["plans"]) == 1
    for text, ents, spans in zip(result["texts"], result["ents"], result["spans"]):
        assert ents == spans
        assert [text[start:end] for start, end, _ in ents] == ["Cora", "Anna"]  # expert1 overlooks the B


@fork_only
def test_forked_workers_report_failing_documents(script, tiny_bank_path):
    check_fakes(script("fakes", "fork", tiny_bank_path))


def test_spawned_workers(script, tiny_bank_path):
    check_fakes(script("fakes", "spawn", tiny_bank_path))


@fork_only
def test_workers_do_not_select(script, tiny_bank_path):
    assert "[S703]" in script("no_plan", "fork", tiny_bank_path)["error"]


def test_pipeline_needs_no_heavy_imports(tmp_path):
    """Neither to build one, nor to save and load it."""
    code = f"""
import sys, spacy
nlp = spacy.blank("en")
nlp.add_pipe("sam_ner", config={{"labels": ["person"]}})
nlp.to_disk({str(tmp_path)!r})
spacy.load({str(tmp_path)!r})
print(sorted({{"peft", "sentence_transformers"}} & set(sys.modules)))
"""
    assert run("-c", code) == "[]\n"


def test_import_is_quiet_and_light():
    code = "import sys, spacy_sam; print(spacy_sam.__version__, sorted({'torch', 'spacy', 'numpy'} & set(sys.modules)))"
    assert run("-W", "error", "-c", code) == f"{spacy_sam.__version__} []\n"
