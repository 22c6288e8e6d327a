"""The bridge to spacy-llm: our model under any task, our task on any model, both together, saved and loaded."""

import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterable, List, Optional, Tuple

import pytest
import spacy
import torch
from fakes import NAME, plan_of
from helpers import make_tiny_bank
from remembering import REMEMBERED, REMEMBERED_LABELS, make_remembering_bank
from spacy.tokens import Doc, Span
from spacy.training import Example
from spacy_llm.registry import registry
from spacy_llm.ty import supports_sharding

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate.engine import Request
from spacy_sam.llm import MergedModel, NerTask, make_merged, make_ner
from spacy_sam.merge.methods import Mean
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.prompts import LinesFormat, make_format
from spacy_sam.windows import estimate_starts

LABELS = ["person", "place"]
PROMPT = re.compile(r"Types: (?P<labels>.*)\nText: (?P<text>.*)\nEntities:\n\Z")
TEXTS = [
    "Anna Keller moved from Bern to Lisbon.",
    "Omar Haddad took the train to Paris with Lena and Jakob.",
    "Hi there",
]


class Parrot:
    """A model that names the capitalised words of our prompts. The label follows from the word's length."""

    def __init__(self, context_length: Optional[int]) -> None:
        self.context_length = context_length
        self.calls: List[List[List[str]]] = []

    def __call__(self, prompts: Iterable[Iterable[str]]) -> Iterable[Iterable[str]]:
        self.calls.append([list(of_doc) for of_doc in prompts])
        return [[self.answer(prompt) for prompt in of_doc] for of_doc in self.calls[-1]]

    def answer(self, prompt: str) -> str:
        match = PROMPT.search(prompt)
        assert match, prompt
        labels = match["labels"].split("; ")
        return "".join(f" {name} | {labels[len(name) % len(labels)]}\n" for name in NAME.findall(match["text"]))


class Numbered(Parrot):
    """`X7` is of `kind 7`, if that is asked."""

    def answer(self, prompt: str) -> str:
        return "".join(f"X{n} | kind {n}\n" for n in range(99) if re.search(rf"kind {n}\b.*\bX{n}\b", prompt, re.S))


class Short(Parrot):
    def __call__(self, prompts: Iterable[Iterable[str]]) -> Iterable[Iterable[str]]:
        return [answers[1:] for answers in super().__call__(prompts)]  # type: ignore[index]


class Unbounded:
    """A model without a context length."""

    def __call__(self, prompts: Iterable[Iterable[str]]) -> Iterable[Iterable[str]]:
        return Parrot(None)(prompts)


class Recite:
    """A task that shards nothing and keeps what the model wrote."""

    def generate_prompts(self, docs: Iterable[Doc]) -> Iterable[str]:
        return [f"Say: {doc.text}" if doc.text else "" for doc in docs]

    def parse_responses(self, docs: Iterable[Doc], responses: Iterable[str]) -> Iterable[Doc]:
        for doc, answers in zip(docs, responses, strict=True):
            doc.user_data["said"] = list(answers)  # one of each document, whatever spacy-llm wants the type to be
            yield doc


def register_parrot(parrot: Any) -> None:
    registry.llm_models(f"sam_tests.{parrot.__name__}.v1", func=lambda context=4096: parrot(context))


for parrot in (Parrot, Numbered, Short):
    register_parrot(parrot)
registry.llm_models("sam_tests.Unbounded.v1", func=Unbounded)
registry.llm_tasks("sam_tests.Recite.v1", func=Recite)


def make_nlp(task: Dict[str, Any], model: Dict[str, Any], **config: Any) -> Any:
    nlp = spacy.blank("en")
    task = {"@llm_tasks": "spacy_sam.NER.v1", **task}
    model = {"@llm_models": "spacy_sam.Merged.v1", **model}
    nlp.add_pipe("llm", config={"task": task, "model": model, **config})
    return nlp


def make_parroting(labels: Any = LABELS, model: str = "Parrot", context: int = 4096, **task: Any) -> Any:
    settings = {"labels": labels, "instruction": "Copy names.\n", **task}
    return make_nlp(settings, {"@llm_models": f"sam_tests.{model}.v1", "context": context})


def parts(nlp: Any) -> Tuple[Any, Any]:
    pipe = nlp.get_pipe("llm")
    return pipe._task, pipe._model


def ents(doc: Doc) -> List[Tuple[int, int, str]]:
    return [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]


def names_in(text: str, labels: Any = LABELS) -> List[Tuple[int, int, str]]:
    return [(m.start(), m.end(), labels[len(m[0]) % len(labels)]) for m in NAME.finditer(text)]


def code_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SamError) as caught:
        function(*args, **kwargs)
    return caught.value.code


@pytest.fixture(scope="module")
def plan_path(tiny_bank_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan of two task models."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan_of(ExpertBank(tiny_bank_path), ("expert0", "expert1"), "expert2").to_disk(path)
    return str(path)


@pytest.fixture
def settings(tiny_bank_path: Path, plan_path: str) -> Dict[str, Dict[str, Any]]:
    bank = str(tiny_bank_path)
    model = {"plan": plan_path, "bank": bank, "device": "cpu", "max_new_tokens": 24}
    return {"task": {"labels": LABELS, "bank": bank}, "model": model}


# Our model


def test_llm_completions_are_those_of_the_engine(settings, plan_path):
    """The same prompts, tokens, grammar and task model as under sam_ner."""
    for number, spec in enumerate(Plan.from_disk(plan_path).task_models, 1):
        nlp = make_nlp(settings["task"], {**settings["model"], "task_model": number}, save_io=True)
        engine = parts(nlp)[1].engine
        engine.entity_bias = 1.0  # a random model finds more then
        texts = [text for text in TEXTS if len(engine.token_starts(text)) >= 4]
        said = [doc.user_data["llm_io"]["llm"]["response"] for doc in nlp.pipe(texts)]
        expected = engine.generate([Request(spec, tuple(LABELS), text) for text in texts])
        assert said == [[completion.text] for completion in expected]
        assert len(set(map(str, said))) == len(texts)


def test_llm_same_entities_as_sam_ner(tmp_path):
    """A base that knows four texts by heart: both ways find what it learned."""
    bank = make_remembering_bank(tmp_path / "bank")
    plan = plan_of(bank, ("expert0", "expert1"))
    plan.to_disk(tmp_path / "plan.json")
    labels = dict(zip(("PER", "LOC"), REMEMBERED_LABELS, strict=True))
    nlp = make_nlp(
        {"labels": labels, "bank": str(bank.path)},
        {"plan": str(tmp_path / "plan.json"), "bank": str(bank.path), "device": "cpu"},
    )
    sam = spacy.blank("en")
    engine = {"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu"}
    component: Any = sam.add_pipe("sam_ner", config={"labels": labels, "bank": str(bank.path), "engine": engine})
    component.plan = plan
    component.cfg["selection"] = "manual"
    names = {phrase: name for name, phrase in labels.items()}
    for ours, theirs, expected in zip(nlp.pipe(REMEMBERED), sam.pipe(REMEMBERED), REMEMBERED.values(), strict=True):
        assert ents(ours) == ents(theirs) == [(start, end, names[label]) for start, end, label in expected]


def test_llm_one_call_for_a_batch(settings, monkeypatch):
    nlp = make_nlp(settings["task"], settings["model"])
    model = parts(nlp)[1]
    complete, calls = model.engine.complete, []

    def count(spec: TaskModelSpec, prompts: List[str]) -> Any:
        calls.append(prompts)
        return complete(spec, prompts)

    monkeypatch.setattr(model.engine, "complete", count)
    assert len(list(nlp.pipe([*TEXTS, "one two three " * 60, ""]))) == 5
    assert len(calls) == 1
    assert len(calls[0]) > 5


def test_llm_weights_are_not_loaded_before_the_first_prompt(settings):
    nlp = make_nlp(settings["task"], settings["model"])
    task, model = parts(nlp)
    assert isinstance(task, NerTask)
    assert isinstance(model, MergedModel)
    assert model.context_length == 512
    assert model._engine is None
    nlp("Hello")
    assert model.context_length == model.engine.context == 512


def test_llm_context_length_of_a_base_that_is_not_here(bank_copy, settings):
    model = make_merged(experts=["expert0"], bank=bank_copy.path, device="cpu")
    (Path(bank_copy.base[0]) / "config.json").unlink()
    assert model.context_length is None
    assert code_of(model, [["Hello"]]) == "S503"


def test_llm_experts_instead_of_a_plan(tiny_bank_path, plan_path):
    where = {"bank": tiny_bank_path, "device": "cpu"}
    assert make_merged(experts=["expert2"], **where).task_model == TaskModelSpec(("expert2",))
    assert make_merged(experts=[], **where).task_model == TaskModelSpec()
    assert make_merged(experts=["expert1", "expert0"], merge=Mean(0.5), **where).task_model == TaskModelSpec(
        ("expert0", "expert1"), (), {"@misc": "spacy_sam.Mean.v1", "scale": 0.5}
    )
    assert make_merged(plan=plan_path, task_model=2, **where).task_model.experts == ("expert2",)
    as_in_a_config: Any = 2.0
    assert make_merged(plan=plan_path, task_model=as_in_a_config, **where).task_model.experts == ("expert2",)


def test_llm_merge_in_a_config(settings, tiny_bank_path):
    merge = {"@misc": "spacy_sam.TaskArithmetic.v1", "scale": 0.3}
    model = {"experts": ["expert0", "expert1"], "merge": merge, "bank": str(tiny_bank_path), "device": "cpu"}
    nlp = make_nlp(settings["task"], model)
    assert parts(nlp)[1].task_model.method == merge
    assert nlp("Anna met Bob.").text == "Anna met Bob."


def test_llm_other_tasks_on_our_model(settings):
    nlp = make_nlp({"@llm_tasks": "sam_tests.Recite.v1"}, settings["model"])
    docs = list(nlp.pipe([TEXTS[0], "", TEXTS[1]]))
    engine = parts(nlp)[1].engine
    prompts = [f"Say: {text}" for text in TEXTS[:2]]
    one, two = (completion.text for completion in engine.complete(parts(nlp)[1].task_model, prompts))
    assert [doc.user_data["said"] for doc in docs] == [[one], [""], [two]]
    assert one != two


def test_llm_builtin_task_on_our_model(settings):
    template = "Text: {{ text }}\nPositive or negative:"
    nlp = make_nlp(
        {"@llm_tasks": "spacy.TextCat.v3", "labels": ["good", "bad"], "template": template}, settings["model"]
    )
    assert set(nlp("The food was good.").cats) <= {"good", "bad"}


def test_llm_prompt_too_long(settings):
    model = parts(make_nlp(settings["task"], settings["model"]))[1]
    with pytest.raises(SamError, match="512") as caught:
        model([["fine"], ["fine", "a b c d " * 200]])
    assert caught.value.code == "S505"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"plan": "nowhere.json"}, "S111"),
        ({"plan": None}, "S205"),
        ({"experts": ["expert0"]}, "S205"),
        ({"merge": {"@misc": "spacy_sam.Mean.v1"}}, "S205"),
        ({"plan": None, "experts": ["nobody"]}, "S108"),
        ({"plan": None, "experts": ["expert0", "expert0"]}, "S113"),
        ({"bank": "nowhere"}, "S101"),
        ({"task_model": 0}, "S205"),
        ({"task_model": 3}, "S205"),
        ({"task_model": -1}, "S205"),
        ({"max_new_tokens": 0}, "S205"),
    ],
)
def test_llm_bad_model_settings_when_built(settings, change, code):
    assert code_of(make_nlp, settings["task"], {**settings["model"], **change}) == code


def test_llm_device_and_dtype_are_checked_at_first_use(settings):
    nlp = make_nlp(settings["task"], {**settings["model"], "dtype": "int3"})
    assert code_of(nlp, "Hello") == "S502"


def test_llm_plan_of_another_bank_or_expert(settings, bank_copy, plan_path, tmp_path):
    other = make_tiny_bank(tmp_path / "other", n_experts=1, seed=5)
    assert code_of(make_merged, plan=plan_path, bank=other.path) == "S112"
    config = bank_copy.folder("expert2") / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert code_of(make_merged, plan=plan_path, bank=bank_copy.path) == "S116"
    bank_copy.remove("expert2")
    assert code_of(make_merged, plan=plan_path, bank=bank_copy.path) == "S108"


def test_llm_model_in_a_new_process(settings, monkeypatch):
    model = parts(make_nlp(settings["task"], settings["model"]))[1]
    threads: List[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    again = pickle.loads(pickle.dumps(model))
    assert again.engine is again.engine
    assert threads == []
    again._guarded_pid = -1
    assert again.engine is again.engine
    assert threads == [1]
    model._guarded_pid = -1
    model._engine = SimpleNamespace(device=torch.device("cuda"))
    assert code_of(lambda: model.engine) == "S504"


# Our task


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("context", [130, 4096])
def test_llm_long_documents_in_windows(segmented, context):
    sentence = "Then Anna, Omar and Grace\tleft  Kyoto\nfor Paris; no one (but Lena) saw 東京 or 😀 Cork. "
    texts = [sentence * n for n in (1, 9, 40)] + ["", " \n", "Bern", "x" * 700 + " Bern"]
    nlp = make_parroting(context=context, window_size=64, window_overlap=12)
    if segmented:
        nlp.add_pipe("sentencizer", first=True)
    docs = [nlp.make_doc(text) for text in texts]
    for doc, annotated, text in zip(docs, nlp.pipe(docs), texts, strict=True):
        assert annotated is doc
        assert doc.text == text
        assert ents(doc) == names_in(text)
        assert doc.has_annotation("ENT_IOB") or not len(doc)
    task, model = parts(nlp)
    (call,) = model.calls
    assert [len(prompts) for prompts in call[3:6]] == [1, 1, 1]
    assert len(call[2]) > len(call[1]) > 1
    most = min(64, (context - len(estimate_starts(task.format.prefix(LABELS) + task.format.body("")))) // 2)
    for prompt in (prompt for prompts in call for prompt in prompts):
        assert len(estimate_starts(PROMPT.search(prompt)["text"])) <= most  # type: ignore[index]


def test_llm_shards_are_the_document():
    nlp = spacy.blank("en")
    task = make_ner(LABELS, instruction="", window_size=16, window_overlap=4)
    assert supports_sharding(task)
    docs = [nlp.make_doc("Anna met Omar in Bern. " * 8), nlp.make_doc("")]
    pairs = [(list(prompts), list(shards)) for prompts, shards in task.generate_prompts(docs, 512)]
    for (prompts, shards), doc in zip(pairs, docs, strict=True):
        assert len(prompts) == len(shards) >= 1
        assert all(shard is doc for shard in shards)
    answers = [["" for _ in prompts] for prompts, _ in pairs]
    assert list(task.parse_responses((shards for _, shards in pairs), iter(answers))) == docs


def test_llm_task_asks_as_the_bank_does(settings, tiny_bank_path):
    nlp = make_nlp(settings["task"], settings["model"], save_io=True)
    known = make_format(ExpertBank(tiny_bank_path).prompt)
    doc = nlp(TEXTS[0])
    assert doc.user_data["llm_io"]["llm"]["prompt"] == [known.prefix(LABELS) + known.body(TEXTS[0])]
    again = Doc(nlp.vocab).from_bytes(doc.to_bytes())
    assert again.user_data["llm_io"] == doc.user_data["llm_io"]
    assert make_ner(LABELS, instruction="").format == LinesFormat()


def test_llm_existing_entities_stay():
    nlp = make_parroting()
    doc = nlp.make_doc("Anna Keller met Omar in Bern.")
    doc.ents = [Span(doc, 0, 2, label="star"), Span(doc, 4, 5, label="verb")]
    assert ents(nlp(doc)) == [(0, 11, "star"), (16, 20, "person"), (21, 23, "verb"), (24, 28, "person")]


def test_llm_longer_one_of_two_stays():
    task = make_ner(LABELS, instruction="")
    doc = spacy.blank("en")("Anna Keller of Bern")
    list(task.generate_prompts([doc]))
    answer = " Keller | place\n Anna Keller | person\n nonsense\n Rome | place\n Bern | place"
    assert list(task.parse_responses([[doc]], [[answer]])) == [doc]
    assert ents(doc) == [(0, 11, "person"), (15, 19, "place")]


def test_llm_many_labels_are_asked_in_groups():
    labels = [f"kind {n}" for n in range(40)]
    text = " ".join(f"the X{n} is new," for n in range(40))
    nlp = make_parroting(labels, "Numbered", window_size=50)
    doc = nlp(text)
    assert [(ent.text, ent.label_) for ent in doc.ents] == [(f"X{n}", f"kind {n}") for n in range(40)]
    asked = {match["labels"] for prompt in parts(nlp)[1].calls[0][0] if (match := PROMPT.search(prompt))}
    assert sorted(len(group.split("; ")) for group in asked) == [13, 13, 14]
    assert len(nlp("")) == 0
    assert len(parts(nlp)[1].calls[1][0]) == 1


def test_llm_labels_ask_other_words():
    nlp = make_parroting({"PER": "person", "GPE": "place"})
    assert [ent.label_ for ent in nlp("Anna met Grace").ents] == ["PER", "GPE"]
    pipe = nlp.get_pipe("llm")
    assert pipe.labels == ("PER", "GPE")
    assert pipe.add_label("PER") == 0
    assert pipe.add_label("ORG", "organization") == 1
    assert pipe.add_label("thing") == 1
    assert pipe.labels == ("PER", "GPE", "ORG", "thing")
    assert "person; place; organization; thing" in pipe.task.prompt_template
    nlp("Anna")
    assert "Types: person; place; organization; thing\n" in parts(nlp)[1].calls[-1][0][0]
    assert code_of(pipe.add_label, "AGENCY", "organization") == "S202"
    assert code_of(pipe.add_label, "a;b") == "S203"
    pipe.clear()
    assert pipe.labels == ()
    assert code_of(nlp, "Anna") == "S202"


@pytest.mark.filterwarnings("ignore:Task supports sharding, but model does not:UserWarning")
def test_llm_model_without_context_length():
    nlp = make_nlp({"labels": LABELS, "instruction": ""}, {"@llm_models": "sam_tests.Unbounded.v1"})
    text = "Anna went to Bern. " * 100
    assert ents(nlp(text)) == names_in(text)


def test_llm_missing_answers_are_no_silent_loss():
    nlp = make_parroting(model="Short")
    with pytest.raises(ValueError, match="zip"):
        nlp("Anna went to Bern.")


def test_llm_labels_that_leave_no_room():
    assert code_of(make_parroting(context=40), "Anna went to Bern.") == "S204"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"labels": {"a": "same", "b": "same"}}, "S202"),
        ({"labels": ["a;b"]}, "S203"),
        ({"bank": "nowhere"}, "S101"),
        ({"window_size": 7}, "S205"),
        ({"window_overlap": -1}, "S205"),
        ({"window_size": 20, "window_overlap": 20}, "S205"),
    ],
)
def test_llm_bad_task_settings_when_built(settings, change, code):
    assert code_of(make_nlp, {**settings["task"], **change}, settings["model"]) == code


def test_llm_scores():
    nlp = make_parroting()
    texts = ["Anna met Grace in Bern.", "nobody here"]
    annotations = [{"entities": names_in(text)} for text in texts]
    examples = [Example.from_dict(nlp.make_doc(t), a) for t, a in zip(texts, annotations, strict=True)]
    scores = nlp.evaluate(examples)
    assert scores["ents_f"] == 1
    assert set(scores["ents_per_type"]) == {"person", "place"}


@pytest.mark.parametrize(
    ("text", "n_tokens"),
    [
        ("", 0),
        ("Anna met Omar", 3),
        ("internationalisation", 5),
        ("NATO 1999", 6),
        ("a\n\n\nb", 4),
        ("東京", 4),
        ("😀é", 4),
        ("\ud800", 2),
    ],
)
def test_llm_estimated_tokens(text, n_tokens):
    starts = estimate_starts(text)
    assert len(starts) == n_tokens
    assert starts == sorted(starts)
    assert all(0 <= start < len(text) for start in starts)


# Saved and loaded


def test_llm_to_disk(settings, tmp_path):
    nlp = make_nlp(settings["task"], settings["model"], save_io=True)
    nlp.get_pipe("llm").add_label("ORG", "organization")
    nlp.to_disk(tmp_path / "pipeline")
    assert not list((tmp_path / "pipeline").rglob("*.safetensors"))
    again = spacy.load(tmp_path / "pipeline")
    assert again.get_pipe("llm").labels == (*LABELS, "ORG")  # type: ignore[attr-defined]
    one, two = nlp(TEXTS[1]), again(TEXTS[1])
    assert one.user_data["llm_io"] == two.user_data["llm_io"]
    assert ents(one) == ents(two)


def test_llm_to_bytes():
    nlp = make_parroting()
    nlp.get_pipe("llm").add_label("ORG", "organization")
    again = make_parroting().from_bytes(nlp.to_bytes())
    assert again.get_pipe("llm").labels == (*LABELS, "ORG")
    text = "Anna went to Lisbon with Omar."
    assert ents(again(text)) == ents(nlp(text)) == names_in(text, [*LABELS, "ORG"])


def test_llm_can_be_pickled(settings):
    nlp = make_nlp(settings["task"], settings["model"], save_io=True)
    said = nlp(TEXTS[0]).user_data["llm_io"]["llm"]
    component = pickle.loads(pickle.dumps(nlp.get_pipe("llm")))
    assert component._model._engine is None
    assert component(nlp.make_doc(TEXTS[0])).user_data["llm_io"]["llm"] == said


def test_llm_several_processes(settings):
    nlp = make_nlp(settings["task"], settings["model"], save_io=True)
    expected = [doc.user_data["llm_io"] for doc in nlp.pipe(TEXTS)]
    found = [doc.user_data["llm_io"] for doc in nlp.pipe(TEXTS, n_process=2, batch_size=2)]
    assert found == expected


def test_llm_import_is_light():
    code = "import sys, spacy_sam.llm; print([m for m in ('transformers', 'peft', 'spacy_llm') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
