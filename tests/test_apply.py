"""`sam apply` from end to end, with a fake engine in this process: outputs, what is done again, what is refused, exit codes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, List, Tuple

import pytest
import spacy
from fakes import plan_of
from pipelines import FAKES, LABELS, add_sam, names_in
from scale_stub import prepare, run
from spacy.language import Language
from spacy.tokens import Doc, DocBin
from typer.testing import CliRunner

import spacy_sam.cli.apply_command  # noqa: F401 (registers the command)
from spacy_sam.bank import ExpertBank
from spacy_sam.cli import app
from spacy_sam.errors import SamError
from spacy_sam.plan import Plan
from spacy_sam.scale.folder import OutputFolder, whole_file
from spacy_sam.scale.job import PipelineSpec, Result
from spacy_sam.scale.progress import Progress
from spacy_sam.scale.run import Settings, apply_corpus
from spacy_sam.scale.schedule import Event, set_up, work
from spacy_sam.scale.shards import Shard

TEXTS = [f"{name} and Anna met {name} in Quito {n} times." for n, name in enumerate(("Bella", "Cora", "Dan", "Emil"))]


class InlinePool:
    """Workers in this process."""

    started: ClassVar[List[Any]] = []

    def __init__(self, job: Any, make_worker: Any, devices: Any = (None,)) -> None:
        self.job, self.make_worker, self.devices = job, make_worker, devices
        self.workers: Dict[int, Any] = {}
        self.waiting: List[Event] = []

    def start(self, worker: int) -> None:
        InlinePool.started.append(worker)
        self.workers[worker] = set_up(self.make_worker, self.job, self.devices[worker % len(self.devices)])
        self.waiting.append(Event(worker, "ready"))

    def send(self, worker: int, task: Tuple[Any, ...]) -> None:
        tell = lambda *counts: self.waiting.append(Event(worker, "progress", counts))  # noqa: E731
        event = Event(worker, *work(self.workers[worker], task, tell))
        self.waiting.append(event)

    def events(self) -> List[Event]:
        found, self.waiting = self.waiting, []
        return found

    def close(self) -> None:
        self.workers.clear()


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    InlinePool.started = []
    monkeypatch.setattr("spacy_sam.scale.local.LocalPool", InlinePool)


def write(path: Path, *texts: Any) -> Path:
    rows = [text if isinstance(text, dict) else {"text": text} for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def read(path: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def raises(code: str, match: str = "") -> Any:
    return pytest.raises(SamError, match=rf"^\[{code}\].*{match}")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number, text in enumerate(TEXTS):
        write(tmp_path / "corpus" / f"{number}.jsonl", {"text": text, "id": number}, "Nobody.")
    return tmp_path / "corpus"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# With a pipeline


@pytest.fixture
def save(tiny_bank_path: Path, tmp_path: Path) -> Callable[..., PipelineSpec]:
    """Save a pipeline with a fake engine; `change` adds to it."""

    def make(change: Callable[[Language], Any] = lambda nlp: None, *experts: str, **config: Any) -> PipelineSpec:
        nlp = spacy.blank("en")
        sam = add_sam(nlp, bank=str(tiny_bank_path), labels=LABELS, **{**FAKES, "batch_size": 2, **config})
        change(nlp)
        if experts:
            sam.plan = plan_of(ExpertBank(tiny_bank_path), *experts)
        nlp.to_disk(tmp_path / "pipeline")
        return PipelineSpec(pipeline=str(tmp_path / "pipeline"))

    return make


def test_apply_annotates(corpus, out, save):
    done = apply_corpus([corpus], out, Settings(spec=save()))
    assert (done.documents, done.shards, done.skipped, done.all_well) == (8, 4, 0, True)
    found = 0
    for number, text in enumerate(TEXTS):
        row, empty = read(out / f"{number}.jsonl")
        expected = [[start, end, label, round(1 / (end - start), 4)] for start, end, label in names_in(text, 0)]
        assert row == {"text": text, "entities": expected, "id": number, "plan": done.plan.fingerprint}
        assert [e[:2] for e in empty["entities"]] == [[0, 6]]
        found += len(expected) + 1
    assert done.entities == found
    assert Plan.from_disk(out / "plan.json") == done.plan


def test_apply_plan_is_selected_once_on_a_sample(corpus, out, save):
    done = apply_corpus([corpus], out, Settings(spec=save(), n_process=3))
    assert len(InlinePool.started) == 3
    again = apply_corpus([corpus], out, Settings(spec=save(), n_process=3))
    assert (again.skipped, again.plan, len(InlinePool.started)) == (4, done.plan, 3)
    (out / "2.jsonl").unlink()
    again = apply_corpus([corpus], out, Settings(spec=save()))
    assert (again.skipped, again.plan, again.documents) == (3, done.plan, 8)


def test_apply_plan_of_the_pipeline(corpus, out, save, tiny_bank_path, tmp_path):
    """A pipeline that selects once or never brings its plan; `plan` goes first."""
    spec = save(lambda nlp: None, "expert1", selection="manual")
    done = apply_corpus([corpus], out, Settings(spec=spec))
    assert done.plan.task_models[0].experts == ("expert1",)
    assert "Bella" not in [TEXTS[0][s:e] for s, e, _, _ in read(out / "0.jsonl")[0]["entities"]]
    plan_of(ExpertBank(tiny_bank_path), "expert2").to_disk(tmp_path / "plan.json")
    given = apply_corpus([corpus], tmp_path / "other", Settings(spec=spec, plan=tmp_path / "plan.json"))
    assert given.plan.task_models[0].experts == ("expert2",)
    with raises("S701"):
        apply_corpus([corpus], tmp_path / "third", Settings(spec=save(selection="manual")))


def test_apply_failing_documents(tmp_path, out, save):
    """They are written without entities, marked and listed; those beside them are annotated."""
    texts = [*TEXTS, "Anna BOOM Bella.", *TEXTS, "Anna " * 500]
    path = write(tmp_path / "a.jsonl", *({"text": text, "id": n} for n, text in enumerate(texts)))
    done = apply_corpus([path], out, Settings(spec=replace(save(), max_length=2000)))
    rows = read(out / "a.jsonl")
    assert [(row["text"], row["id"]) for row in rows] == [(text, n) for n, text in enumerate(texts)]
    assert [bool(row["entities"]) for row in rows] == [n not in (4, 9) for n in range(10)]
    assert "the engine fell over" in rows[4]["error"]
    assert "2500" in rows[9]["error"]
    assert (done.failed, done.all_well) == (2, False)
    assert [(p["input"], p["place"]) for p in read(done.problems)] == [(str(path), 5), (str(path), 10)]


@pytest.mark.parametrize("format_", ["spacy", "prodigy", "label-studio", "doccano"])
def test_apply_failing_documents_in_other_formats(tmp_path, out, save, format_):
    path = write(tmp_path / "a.jsonl", "Anna BOOM.", "Anna " * 500, "", "Anna.")
    done = apply_corpus([path], out, Settings(spec=replace(save(), max_length=2000), format=format_))
    assert (done.documents, done.failed, done.entities) == (4, 2, 1)
    if format_ == "spacy":
        docs = list(DocBin(store_user_data=True).from_disk(out / "a.spacy").get_docs(spacy.blank("en").vocab))
        assert [doc.text for doc in docs] == ["Anna BOOM.", "Anna " * 500, "", "Anna."]
        assert ["error" in doc.user_data for doc in docs] == [True, True, False, False]
        assert docs[3].spans["sc"].attrs["scores"] == [0.25]


def test_apply_other_components_fail(corpus, out, save):
    @Language.component("sam_tests_picky")
    def picky(doc: Doc) -> Doc:
        if "Dan" in doc.text:
            raise ValueError("no Dan")
        return doc

    done = apply_corpus([corpus], out, Settings(spec=save(lambda nlp: nlp.add_pipe("sam_tests_picky", first=True))))
    assert read(out / "2.jsonl")[0]["error"] == "sam_tests_picky: ValueError: no Dan"
    assert done.failed == 1


def test_apply_keeps_docs_of_a_docbin(tmp_path, out, save):
    """Tokens, entities and user data that were there stay; names of the strings do not get lost between batches."""
    nlp = spacy.blank("en")
    docs = [nlp.make_doc(f"Anna met Omar in Town{n}") for n in range(40)]
    docs[0].set_ents([docs[0].char_span(0, 4, label="old")])
    docs[0].user_data["mine"] = 5
    DocBin(docs=docs, store_user_data=True).to_disk(tmp_path / "a.spacy")
    apply_corpus([tmp_path / "a.spacy"], out, Settings(spec=save(), format="spacy"))
    found = list(DocBin(store_user_data=True).from_disk(out / "a.spacy").get_docs(nlp.vocab))
    assert [doc.text for doc in found] == [doc.text for doc in docs]
    assert found[0].ents[0].label_ == "old"
    assert found[0].user_data["mine"] == 5
    assert all("Anna" in [ent.text for ent in doc.ents] for doc in found)


def test_apply_candidates_where_no_entities_are_written(corpus, out, save):
    apply_corpus([corpus], out, Settings(spec=save(annotate_ents=False)))
    assert len(read(out / "0.jsonl")[0]["entities"]) == 4


@pytest.mark.parametrize("n", [0, 2])
def test_apply_pipeline_with_one_sam_ner(corpus, out, tmp_path, save, n):
    def change(nlp: Language) -> None:
        if n == 0:
            nlp.remove_pipe("sam_ner")
            return
        add_sam(nlp, "second", **FAKES)

    with raises("S817", f"{n} of them"):
        apply_corpus([corpus], out, Settings(spec=save(change)))
    with raises("S817", "cannot be loaded"):
        apply_corpus([corpus], out, Settings(spec=PipelineSpec(pipeline=str(tmp_path / "nothing"))))


def test_apply_plan_of_another_bank(corpus, out, save, tmp_path):
    Plan("other base", ()).to_disk(tmp_path / "plan.json")
    with raises("S112"):
        apply_corpus([corpus], out, Settings(spec=save(), plan=tmp_path / "plan.json"))
    assert not out.exists()


# What is done again, and what is refused


def test_apply_again_refuses_what_differs(corpus, out, tmp_path):
    run([corpus], out)
    with raises("S811", "labels"):
        run([corpus], out, spec=PipelineSpec(labels=("x",)))
    with raises("S811", "format"):
        run([corpus], out, format="doccano")
    with raises("S811", "seed"):
        run([corpus], out, seed=5)
    Plan("base", (), strategy="other").to_disk(tmp_path / "plan.json")
    with raises("S811", "plan"):
        run([corpus], out, plan=tmp_path / "plan.json")
    with raises("S811", "not given now"):
        run([corpus / "0.jsonl"], out)
    write(corpus / "1.jsonl", "Other.")
    with raises("S811", "1: the input has changed"):
        run([corpus], out)
    assert read(out / "1.jsonl")[0]["text"] == TEXTS[1]


def test_apply_again_with_another_time_of_change(corpus, out):
    run([corpus], out)
    os.utime(corpus / "0.jsonl", (1, 1))
    assert run([corpus], out).skipped == 4


def test_apply_again_with_more_inputs(corpus, out):
    run([corpus], out)
    write(corpus / "new.jsonl", "Anna")
    done = run([corpus], out)
    assert (done.skipped, done.documents) == (4, 9)


def test_apply_overwrite_does_what_differs(corpus, out):
    run([corpus], out)
    before = (out / "0.jsonl").stat().st_mtime_ns
    write(corpus / "1.jsonl", "Other.")
    (corpus / "2.jsonl").unlink()
    done = run([corpus], out, overwrite=True)
    assert (done.shards, done.skipped) == (3, 2)
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["0.jsonl", "1.jsonl", "3.jsonl"]
    assert (out / "0.jsonl").stat().st_mtime_ns == before
    assert read(out / "1.jsonl")[0]["text"] == "Other."
    done = run([corpus], out, format="label-studio", overwrite=True)
    assert sorted(path.name for path in out.glob("*.json*")) == ["0.json", "1.json", "3.json", "plan.json"]
    assert done.skipped == 0


def test_apply_parts_are_not_mixed(corpus, out):
    """With another shard size there are other shards: the old ones would be there twice."""
    run([corpus], out)
    with raises("S811", "not given now"):
        run([corpus], out, shard_size=60)
    done = run([corpus], out, shard_size=60, overwrite=True)
    texts = [row["text"] for path in sorted(out.glob("*.jsonl")) for row in read(path)]
    assert sorted(texts) == sorted([*TEXTS, *["Nobody."] * 4])
    assert done.documents == 8


def test_apply_problems_in_parts_have_the_file_s_lines(tmp_path, out):
    path = write(tmp_path / "a.jsonl", *(["Anna."] * 9))
    path.write_bytes(path.read_bytes() + b"broken\n")
    done = run([path], out, shard_size=40)
    assert [problem["place"] for problem in read(done.problems)] == [10]
    assert done.shards > 2


def test_apply_missing_plan(corpus, out):
    run([corpus], out)
    (out / "plan.json").unlink()
    with raises("S811", "plan.json is missing"):
        run([corpus], out)
    assert run([corpus], out, overwrite=True).skipped == 0


def test_apply_damaged_entry_is_done_again(corpus, out):
    run([corpus], out)
    (out / "manifest" / "shards" / "0.json").write_text("{", encoding="utf8")
    (out / "1.jsonl").write_text("cut", encoding="utf8")
    done = run([corpus], out)
    assert (done.skipped, done.documents) == (2, 8)


def test_apply_bad_shards_and_lines(corpus, out):
    """The rest goes on; a rerun tries again what could not be read, and still reports the lines."""
    (corpus / "bad.jsonl.gz").write_bytes(b"no gzip")
    (corpus / "1.jsonl").write_bytes(b"broken\n" + (corpus / "1.jsonl").read_bytes())
    done = run([corpus], out)
    assert (done.documents, done.malformed, done.unreadable, done.all_well) == (8, 1, 1, False)
    assert [(Path(p["input"]).name, p["place"]) for p in read(done.problems)] == [
        ("1.jsonl", 1),
        ("bad.jsonl.gz", None),
    ]
    assert not (out / "bad.jsonl").exists()
    again = run([corpus], out)
    assert (again.skipped, again.malformed, again.unreadable) == (4, 1, 1)
    (corpus / "bad.jsonl.gz").unlink()
    write(corpus / "bad.jsonl", "Anna")
    assert run([corpus], out).unreadable == 0


def test_apply_does_not_write_over_inputs(corpus, tmp_path):
    with raises("S812", "input of the run"):
        run([corpus / "0.jsonl"], corpus)
    path = write(tmp_path / "plan.jsonl", "Anna")
    with raises("S812", "the run itself"):
        run([path], tmp_path / "out", format="label-studio")


def test_apply_output_beside_inputs_is_no_input(corpus):
    """A folder inside of the input folder can be written to, and is not read on the next run."""
    assert run([corpus], corpus / "annotated").shards == 4
    assert run([corpus], corpus / "annotated").shards == 4


def test_apply_no_documents(tmp_path, out):
    with raises("S801"):
        run([write(tmp_path / "a.jsonl", "", " ")], out)
    with raises("S810"):
        run([tmp_path / "nothing"], out)


def test_apply_cannot_write(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", encoding="utf8")
    with raises("S813"):
        run([corpus], tmp_path / "file")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with raises("S813", "No space left"):
        run([corpus], tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.sam-tmp"))


def test_apply_duplicates_stay(tmp_path, out):
    """Documents have no identity but their place: the same one twice is annotated twice."""
    rows = [{"text": "Anna", "id": 1}] * 3
    run([write(tmp_path / "a.jsonl", *rows)], out)
    assert [row["id"] for row in read(out / "a.jsonl")] == [1, 1, 1]


def test_apply_two_runs_at_once(corpus, out):
    pytest.importorskip("fcntl")
    with OutputFolder(out, ".jsonl").locked(), raises("S818"):
        run([corpus], out)


def test_apply_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf8")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"%d" % (1 // 0))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text(encoding="utf8") == "old"


def test_apply_settings(corpus, out):
    with raises("S802", "engine"):
        run([corpus], out, engine="spark")
    with raises("S802", "Ray"):
        run([corpus], out, address="127.0.0.1:5")
    with raises("S802", "one --device"):
        pytest.importorskip("ray")
        run([corpus], out, engine="ray", devices=("cuda:0", "cuda:1"))
    assert not out.exists()
    assert prepare(PipelineSpec()).plan is None


# Progress


def test_apply_progress_in_a_log(tmp_path):
    now, said = [0.0], []
    progress = Progress(bar=False, say=said.append, clock=lambda: now[0])
    shards = [Shard(name, str(write(tmp_path / f"{name}.jsonl", "x" * 88)), "jsonl") for name in ("a", "b")]
    progress.start(shards)
    tally = progress.tally
    tally.on_progress("a", 5, 7, 50)
    assert said == []
    now[0] = 50.0
    tally.on_result(Result("a", {"documents": 10, "entities": 20, "malformed": 1, "failed": 0, "problems": []}))
    assert said.pop() == "1/2 shards, 10 documents, 0.2/s, 20 entities, 1 problems, 0:00:50 left"
    tally.on_progress("b", 3, 4, 50)
    assert "13 documents, 0.3/s, 24 entities" in progress.status()
    tally.on_retry("b", "a worker died")
    assert "10 documents" in progress.status()
    tally.on_result(Result("b", failure="it cannot be read"))
    assert said == ["b: a worker died; it is done again", "b: not done: it cannot be read"]
    assert progress.status().startswith("2/2 shards, 10 documents, 0.2/s, 20 entities, 2 problems")


def test_apply_progress_bar(tmp_path, capsys):
    progress = Progress(bar=True, say=print)
    shard = Shard("a", str(write(tmp_path / "a.jsonl", "Anna")), "jsonl")
    progress.start([shard])
    progress.tally.on_result(Result("a", {"documents": 1, "entities": 2, "malformed": 0, "failed": 0, "problems": []}))
    progress.close()
    err = capsys.readouterr().err
    assert "100%" in err
    assert "1/1 shards, 1 documents" in err


# The command


def command(*args: Any) -> Any:
    result = CliRunner().invoke(app, ["apply", *map(str, args)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def test_apply_command(corpus, out, save):
    spec = save()
    result = command(corpus, out, "--pipeline", spec.pipeline)
    assert result.exit_code == 0, result.output
    assert "8 documents" in result.output
    assert "expert0" in result.output
    result = command(corpus, out, "--pipeline", spec.pipeline)
    assert (result.exit_code, "4 of them finished before" in result.output) == (0, True)
    result = command(corpus, out, "--pipeline", spec.pipeline, "-f", "doccano")
    assert result.exit_code == 1
    assert "[S811]" in result.output
    assert command(corpus, out, "--pipeline", spec.pipeline, "-f", "doccano", "--overwrite").exit_code == 0
    assert read(out / "0.jsonl")[0]["label"]


def test_apply_command_finished_with_problems(corpus, out, save):
    (corpus / "0.jsonl").write_bytes((corpus / "0.jsonl").read_bytes() + b"broken\n")
    result = command(corpus, out, "--pipeline", save().pipeline)
    assert result.exit_code == 3
    assert f"{corpus / '0.jsonl'}, 3: not JSON" in result.output
    assert "1 malformed lines" in result.output


@pytest.mark.parametrize("args", [[], ["a.jsonl"], ["a.jsonl", "out", "--nothing"], ["a.jsonl", "out", "-n", "0"]])
def test_apply_command_usage(args):
    result = command(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_apply_command_settings_that_do_not_go_together(corpus, out, save):
    for more in (["--pipeline", save().pipeline, "-l", "person"], ["--txt", "words"], ["--format", "brat"]):
        result = command(corpus, out, *more)
        assert (result.exit_code, "[S802]" in result.output) == (1, True)
    assert not out.exists()


def test_apply_command_labels_of_the_plan(corpus, out, tiny_bank_path, tmp_path, monkeypatch):
    """A blank pipeline, which asks what the plan was made for."""
    from fakes import FakeEngine

    monkeypatch.setattr("spacy_sam.registered.TorchEngineMaker.__call__", lambda self, bank: FakeEngine())
    plan = replace(plan_of(ExpertBank(tiny_bank_path), "expert0"), labels=("town",))
    plan.to_disk(tmp_path / "plan.json")
    result = command(corpus, out, "-b", tiny_bank_path, "-p", tmp_path / "plan.json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {entity[2] for entity in read(out / "0.jsonl")[0]["entities"]} == {"town"}
