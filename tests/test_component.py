"""The spaCy component: what it writes, streams, plans, failures. Settings: test_settings.py; processes: test_processes.py."""

import itertools
import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import pytest
import spacy
from fakes import Answer, FakeEngine, FakeEngineMaker, FakeStrategy, complete, plan_of
from helpers import make_tiny_bank
from pipelines import FAKES, LABELS, TEXTS, Case, add_sam, engines_of, ents, group, make_nlp, names_in, raises, sam_of
from remembering import REMEMBERED, REMEMBERED_LABELS
from spacy.language import Language
from spacy.tokens import Doc, Span

from spacy_sam.align import Candidate
from spacy_sam.bank import ExpertBank
from spacy_sam.component import SamNer
from spacy_sam.generate.engine import Completion, Request
from spacy_sam.plan import Plan
from spacy_sam.select.encoder import SentenceEncoder
from spacy_sam.write import merge_windows

# Annotations


def test_component_writes_entities_and_spans(make_case):
    nlp, _, bank = make_case()
    plan = plan_of(bank, "expert1", "expert2")
    text = "Anna , Bella and Cora know Anna ."
    doc = nlp(text, component_cfg={"sam_ner": {"plan": plan}})
    assert ents(doc) == group(doc) == names_in(text)
    assert [text[start:end] for start, end, _ in ents(doc)] == ["Anna", "Bella", "Cora", "Anna"]
    attrs = doc.spans["sc"].attrs
    assert attrs["scores"] == pytest.approx([1 / 4, 1 / 5, 1 / 4, 1 / 4])
    assert attrs["sources"] == [[0, 1], [1], [0], [0, 1]]
    assert attrs["plan"] == plan.fingerprint
    assert doc.has_annotation("ENT_IOB")


def test_component_keeps_texts_and_docs(make_case):
    nlp = make_case(batch_size=2).nlp
    texts = ["  Anna\n\nBella\t", "Nobody\u3000here", "\n", "Cora's", "(Dan)", "mid-Emil", "naïve Zoë\u0301"]
    docs = [nlp.make_doc(text) for text in texts]
    out = list(nlp.pipe(docs))
    assert len(out) == len(docs)
    assert all(one is other for one, other in zip(out, docs))
    assert [doc.text for doc in out] == texts
    assert ents(out[0]) == names_in(texts[0])
    doc = nlp.make_doc("Anna")
    assert nlp(doc) is doc


def test_component_widens_to_whole_tokens(make_case):
    nlp, sam, bank = make_case()
    plan = plan_of(bank, "expert0")
    doc = sam(Doc(nlp.vocab, words=["the", "xAnna-y", "z"]), plan=plan)
    assert ents(doc) == []  # NAME needs a word boundary, and so does the alignment
    doc = sam(Doc(nlp.vocab, words=["the", "(Anna-y)", "z"]), plan=plan)
    assert [ent.text for ent in doc.ents] == ["(Anna-y)"]


@pytest.mark.parametrize("overlap", [0, 1, 7])
@pytest.mark.parametrize("place", [0, 9_000, 19_900])
def test_component_long_document(make_case, overlap, place):
    nlp, sam, bank = make_case(window_size=16, window_overlap=overlap)
    filler = "word , more words and a break\n"
    text = filler * (place // len(filler)) + "Here Zanzibar is . " + filler * ((20_000 - place) // len(filler))
    (doc,) = nlp.pipe([text], component_cfg={"sam_ner": {"plan": plan_of(bank, "expert0")}})
    assert ents(doc) == group(doc) == names_in(text)
    assert "Zanzibar" in [ent.text for ent in doc.ents]
    (engine,) = engines_of(sam)
    assert max(len(engine.token_starts(request.text)) for request in engine.requests) <= 16


def test_component_sentences_are_windows(make_case):
    nlp, sam, bank = make_case(window_size=16, window_overlap=0)
    doc = nlp.make_doc(" ".join(f"Anna saw number {n} again ." for n in range(20)))
    for token in doc:
        token.is_sent_start = token.text == "Anna"
    sam(doc, plan=plan_of(bank, "expert0"))
    assert ents(doc) == names_in(doc.text)
    assert all(request.text.endswith(".") for request in engines_of(sam)[0].requests)


def test_component_document_of_a_megabyte(make_case):
    nlp, sam, bank = make_case()
    words = ["Anna" if n % 50 == 7 else "word" for n in range(200_000)]
    words[-1] = "Zanzibar"
    doc = Doc(nlp.vocab, words=words)
    text = doc.text
    assert len(text) > 999_000
    started = time.process_time()
    sam(doc, plan=plan_of(bank, "expert0"))
    assert time.process_time() - started < 30
    assert ents(doc) == names_in(text)
    assert doc.text == text


def with_engine(case: Case, make_engine: Callable[[ExpertBank], Any]) -> SamNer:
    return SamNer(case.nlp.vocab, bank=case.bank.path, labels=LABELS, strategy=FakeStrategy(), engine=make_engine)


def test_component_overlapping_candidates(make_case):
    """The higher score wins, then what more task models found; all candidates are in the spans."""

    def find(request: Request) -> List[Answer]:
        (name,) = request.task_model.experts
        return {
            "expert0": [("Anna Bell", "person", 0.3), ("New Rome City", "place", 0.2)],
            "expert1": [("Anna", "person", 0.8), ("Rome", "place", 0.1)],
            "expert2": [("Rome", "place", 0.2), ("City", "person", 0.4)],
        }[name]

    case = make_case()
    sam = with_engine(case, FakeEngineMaker(find))
    doc = sam(case.nlp.make_doc("Anna Bell in New Rome City"), plan=plan_of(case.bank, "expert0", "expert1", "expert2"))
    assert [span.text for span in doc.spans["sc"]] == ["Anna", "Anna Bell", "New Rome City", "Rome", "City"]
    assert doc.spans["sc"].attrs["scores"] == pytest.approx([0.8, 0.3, 0.2, 0.2, 0.4])
    assert doc.spans["sc"].attrs["sources"] == [[1], [0], [0], [1, 2], [2]]
    assert [ent.text for ent in doc.ents] == ["Anna", "Rome", "City"]


def test_component_one_place_with_two_labels(make_case):
    case = make_case()

    def find(request: Request) -> List[Answer]:
        return [("Rome", "person" if request.task_model.experts == ("expert0",) else "place", 0.5)]

    sam = with_engine(case, FakeEngineMaker(find))
    doc = sam(case.nlp.make_doc("In Rome ."), plan=plan_of(case.bank, "expert0", "expert1"))
    assert group(doc) == [(3, 7, "person"), (3, 7, "place")]
    assert ents(doc) == [(3, 7, "person")]


def test_component_joins_what_windows_find():
    """An entity in the overlap of two windows may be found by one task model here and by another there."""
    first = [Candidate(0, 4, "person", 0.5, (1,)), Candidate(8, 9, "place", 0.1, (0, 1))]
    second = [Candidate(0, 4, "person", 0.7, (0,)), Candidate(0, 4, "place", 0.6, (0,))]
    assert merge_windows([first, [], second]) == [
        Candidate(0, 4, "person", 0.7, (0, 1)),
        Candidate(0, 4, "place", 0.6, (0,)),
        Candidate(8, 9, "place", 0.1, (0, 1)),
    ]
    assert merge_windows([]) == merge_windows([[], []]) == []


class OneAnswer(FakeEngine):
    def __init__(self, completion: Completion) -> None:
        super().__init__()
        self.completion = completion

    def generate(self, requests: Sequence[Request]) -> List[Completion]:
        return [self.completion for _ in requests]


@pytest.mark.parametrize("finished", [True, False])
def test_component_counts_what_it_leaves_out(make_case, finished):
    """Of an answer that was cut off, the last line is left out."""
    case = make_case()
    whole = complete([("Anna", "person", 0.5), ("Xerxes", "person", 0.5), ("Bo", "animal", 0.5), ("Bo", "place", 0.5)])
    completion = whole if finished else whole._replace(text=whole.text[:-4], finished=False)
    sam = with_engine(case, lambda _: OneAnswer(completion))
    doc = sam(case.nlp.make_doc("Anna and Bo"), plan=plan_of(case.bank, "expert0"))
    assert [ent.text for ent in doc.ents] == (["Anna", "Bo"] if finished else ["Anna"])
    counts = sam.parts.annotator.counts
    assert (counts.windows, counts.dropped, counts.malformed) == (1, 1, 1)
    assert (counts.mentions, counts.unfinished) == ((3, 0) if finished else (2, 1))


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 4), (0.19, 3), (0.21, 2), (1, 0)])
def test_component_threshold(make_case, threshold, expected):
    nlp, sam, bank = make_case(threshold=threshold)
    doc = sam(nlp.make_doc("Bo Anna Bella Zanzibar"), plan=plan_of(bank, "expert0"))  # 1/2, 1/4, 1/5 and 1/8
    assert len(doc.ents) == len(doc.spans["sc"]) == len(doc.spans["sc"].attrs["scores"]) == expected


def test_component_threshold_itself_is_enough(make_case):
    nlp, sam, bank = make_case(threshold=1)
    answer = complete([("Anna", "person", 1.0), ("Bella", "person", 0.999)])
    sam.parts.make_engine = lambda _: OneAnswer(answer)
    assert [ent.text for ent in sam(nlp.make_doc("Anna Bella"), plan=plan_of(bank, "expert0")).ents] == ["Anna"]


def test_component_no_spans(make_case):
    nlp, sam, bank = make_case(spans_key=None)
    doc = sam(nlp.make_doc(TEXTS[0]), plan=plan_of(bank, "expert0"))
    assert len(doc.spans) == 0
    assert ents(doc) == names_in(TEXTS[0])


def test_component_other_spans_key_and_no_entities(make_case):
    nlp, sam, bank = make_case(spans_key="mine", annotate_ents=False)
    doc = nlp.make_doc(TEXTS[0])
    doc.set_ents([Span(doc, 0, 1, "OLD")])
    sam(doc, plan=plan_of(bank, "expert0"))
    assert list(doc.spans) == ["mine"]
    assert group(doc, "mine") == names_in(TEXTS[0])
    assert [ent.label_ for ent in doc.ents] == ["OLD"]


# What is there already


def doc_with_entity(nlp: Language) -> Doc:
    doc = nlp.make_doc("Anna Bell met Carl")
    doc.set_ents([Span(doc, 0, 2, "OLD", kb_id="Q1", span_id="id1")])
    return doc


def test_component_existing_entities_are_kept(make_case):
    nlp, sam, bank = make_case()
    doc = sam(doc_with_entity(nlp), plan=plan_of(bank, "expert0"))
    assert [(ent.text, ent.label_) for ent in doc.ents] == [("Anna Bell", "OLD"), ("Carl", "person")]
    assert (doc.ents[0].kb_id_, doc.ents[0].id_) == ("Q1", "id1")
    assert group(doc) == names_in(doc.text)


def test_component_existing_entities_are_overwritten(make_case):
    nlp, sam, bank = make_case(overwrite=True)
    doc = nlp.make_doc("Anna Bell met Carl the Old")
    doc.set_ents([Span(doc, 0, 2, "OLD"), Span(doc, 4, 5, "OLD")])
    sam(doc, plan=plan_of(bank, "expert0"))
    assert [(ent.text, ent.label_) for ent in doc.ents] == [
        ("Anna", "person"),
        ("Bell", "person"),
        ("Carl", "person"),
        ("Old", "place"),
    ]


def test_component_new_entities_win_over_those_they_overlap(make_case):
    """By SpanRuler's filter of this name, without `overwrite`."""
    nlp, sam, bank = make_case(ents_filter={"@misc": "spacy.prioritize_new_ents_filter.v1"})
    doc = nlp.make_doc("Anna Bell met Carl the Old")
    doc.set_ents([Span(doc, 0, 2, "OLD"), Span(doc, 4, 5, "OLD")])
    sam(doc, plan=plan_of(bank, "expert0"))
    assert [(ent.text, ent.label_) for ent in doc.ents] == [
        ("Anna", "person"),
        ("Bell", "person"),
        ("Carl", "person"),
        ("the", "OLD"),
        ("Old", "place"),
    ]


@spacy.registry.misc("sam_tests.last_ent_filter.v1")
def make_last_ent_filter() -> Any:
    return lambda existing, new: [*list(existing)[:1], *list(new)[-1:]]


def test_component_own_filter_decides(make_case):
    nlp, sam, bank = make_case(ents_filter={"@misc": "sam_tests.last_ent_filter.v1"})
    doc = nlp.make_doc("Anna Bell met Carl and Dan")
    doc.set_ents([Span(doc, 0, 2, "OLD")])
    sam(doc, plan=plan_of(bank, "expert0"))
    assert [ent.text for ent in doc.ents] == ["Anna Bell", "Dan"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_component_existing_spans(make_case, overwrite):
    nlp, sam, bank = make_case(overwrite=overwrite)
    doc = nlp.make_doc("Anna met Carl")
    doc.spans["sc"] = [Span(doc, 1, 2, "verb"), Span(doc, 0, 1, "person")]
    doc.spans["sc"].attrs["scores"] = np.array([0.7, 0.6])
    doc.spans["other"] = [Span(doc, 0, 3, "all")]
    sam(doc, plan=plan_of(bank, "expert0"))
    old = [] if overwrite else [(5, 8, "verb")]
    assert group(doc) == [*names_in(doc.text), *old]
    attrs = doc.spans["sc"].attrs
    assert attrs["scores"] == pytest.approx([0.25, 0.25] + ([] if overwrite else [0.7]))
    assert attrs["sources"] == [[0], [0]] + ([] if overwrite else [[]])
    assert len(doc.spans["other"]) == 1
    json.dumps(attrs)


def test_component_twice_is_as_once(make_case):
    nlp, sam, bank = make_case()
    doc = nlp.make_doc(TEXTS[0])
    for _ in range(2):
        sam(doc, plan=plan_of(bank, "expert0"))
        assert ents(doc) == group(doc) == names_in(TEXTS[0])


def test_component_two_in_one_pipeline(make_case):
    nlp, _, bank = make_case()
    other = nlp.add_pipe(
        "sam_ner", name="other", config={"bank": str(bank.path), "labels": ["thing"], "spans_key": "other", **FAKES}
    )
    text = "Bella met Cora ."
    plans = {"sam_ner": {"plan": plan_of(bank, "expert1")}, "other": {"plan": plan_of(bank, "expert0")}}
    doc = nlp(text, component_cfg=plans)
    assert group(doc) == names_in(text, 1)
    assert group(doc, "other") == names_in(text, labels=["thing"])
    assert ents(doc) == [(0, 5, "thing"), (10, 14, "person")]
    assert other.labels == ("thing",)


# Streams


def test_pipe_is_the_same_as_one_by_one(make_case):
    nlp, sam, bank = make_case(batch_size=3, selection="manual")
    sam.plan = plan_of(bank, "expert1")
    docs = list(nlp.pipe(TEXTS))
    assert [ents(doc) for doc in docs] == [names_in(text, 1) for text in TEXTS]
    assert [group(doc) for doc in docs] == [group(nlp(text)) for text in TEXTS]
    assert [len(call) for call in engines_of(sam)[0].calls][:2] == [3, 2]


def test_pipe_as_tuples(make_case):
    nlp = make_case(look_ahead=2, batch_size=2).nlp
    out = list(nlp.pipe(((text, {"id": n}) for n, text in enumerate(TEXTS)), as_tuples=True))
    assert [context["id"] for _, context in out] == list(range(len(TEXTS)))
    assert [doc.text for doc, _ in out] == TEXTS


def test_pipe_empty_stream(make_case):
    nlp, sam, _ = make_case()
    assert list(nlp.pipe([])) == []
    assert sam.plan is None
    assert engines_of(sam) == []


@pytest.mark.parametrize("look_ahead", [1, 3, 5, 100])
def test_pipe_selects_on_the_head(make_case, look_ahead):
    case = make_case(look_ahead=look_ahead)
    docs = list(case.nlp.pipe(TEXTS))
    assert case.samples == [tuple(TEXTS[:look_ahead])]
    assert [ents(doc) for doc in docs] == [names_in(text) for text in TEXTS]
    assert case.sam.plan == plan_of(case.bank, "expert0")
    assert {doc.spans["sc"].attrs["plan"] for doc in docs} == {case.sam.plan.fingerprint}


def test_pipe_blank_documents(make_case):
    case = make_case(look_ahead=4)
    texts = ["", " ", "Anna", "\n\t ", "", "Bella"]
    docs = list(case.nlp.pipe(texts))
    assert [doc.text for doc in docs] == texts
    assert case.samples == [("Anna",)]
    assert [ents(doc) for doc in docs] == [names_in(text) for text in texts]
    assert [group(doc) for doc in docs] == [names_in(text) for text in texts]
    assert all(doc.has_annotation("ENT_IOB") for doc in docs if len(doc))


def test_pipe_blank_head(make_case):
    case = make_case(look_ahead=3, batch_size=2, min_docs=1)
    texts = ["", " ", "\n", "", "", "Anna", "Bella", "Cora"]
    docs = list(case.nlp.pipe(texts))
    assert [doc.text for doc in docs] == texts
    assert case.samples == [("Anna",)]  # of the first batch with any text
    assert [group(doc) for doc in docs] == [names_in(text) for text in texts]


def test_pipe_nothing_but_blanks(make_case):
    case = make_case()
    docs = list(case.nlp.pipe(["", " ", "\n"] * 50))
    assert len(docs) == 150
    assert all(len(doc.spans["sc"]) == 0 and doc.spans["sc"].attrs["plan"] is None for doc in docs)
    assert case.sam.plan is None
    assert case.engines == []


def endless(pulled: List[int]) -> Iterator[str]:
    for number in itertools.count():
        pulled.append(number)
        yield TEXTS[number % len(TEXTS)]


def test_pipe_endless_stream_is_pulled_in_bounds(make_case):
    nlp = make_case(look_ahead=20, batch_size=8).nlp
    pulled: List[int] = []
    stream = nlp.pipe(endless(pulled))
    next(stream)
    assert len(pulled) == 20
    for n_docs in range(2, 60):
        next(stream)
        assert len(pulled) <= max(20, n_docs + 8)
    stream.close()
    assert len(pulled) <= 68
    assert ents(nlp(TEXTS[0])) == names_in(TEXTS[0])


def test_pipe_with_a_plan_looks_no_further_than_a_batch(make_case):
    nlp, sam, bank = make_case(look_ahead=20, batch_size=8)
    pulled: List[int] = []
    stream = nlp.pipe(endless(pulled), component_cfg={"sam_ner": {"plan": plan_of(bank, "expert1")}})
    assert ents(next(stream)) == names_in(TEXTS[0], 1)
    assert len(pulled) == 8
    assert sam.plan is None


def test_pipe_closed_early(make_case):
    nlp = make_case(batch_size=2).nlp
    stream = nlp.pipe(TEXTS)
    next(stream)
    stream.close()
    assert [ents(doc) for doc in nlp.pipe(TEXTS)] == [names_in(text) for text in TEXTS]


def test_pipe_interleaved_streams_keep_their_plans(make_case):
    case = make_case(batch_size=1, look_ahead=1, min_docs=1)
    streams = [case.nlp.pipe(TEXTS) for _ in range(3)]  # these select expert0, expert1 and expert2
    given = plan_of(case.bank, "expert1")
    streams.append(case.nlp.pipe(TEXTS, component_cfg={"sam_ner": {"plan": given}}))
    for text, *docs in zip(TEXTS, *streams, strict=True):
        assert [ents(doc) for doc in docs] == [names_in(text, number) for number in (0, 1, 2, 1)]
    assert case.sam.plan == plan_of(case.bank, "expert2")


# Plans


def plans_of_streams(case: Case, *lengths: int) -> List[str]:
    """The expert of each stream's plan, of streams with these numbers of documents."""
    used = []
    for length in lengths:
        docs = list(case.nlp.pipe((TEXTS * length)[:length]))
        (fingerprint,) = {doc.spans["sc"].attrs["plan"] for doc in docs}
        assert case.sam.plan is not None
        assert fingerprint == case.sam.plan.fingerprint
        used.append(case.sam.plan.task_models[0].name)
    return used


def test_plan_stream_mode(make_case):
    case = make_case(min_docs=4)
    assert plans_of_streams(case, 4, 3, 4, 1, 5) == ["expert0", "expert0", "expert1", "expert1", "expert2"]


def test_plan_stream_mode_short_first_stream(make_case):
    assert plans_of_streams(make_case(min_docs=4), 1, 3, 4) == ["expert0", "expert0", "expert1"]


def test_plan_once_mode(make_case):
    case = make_case(selection="once", min_docs=2)
    assert plans_of_streams(case, 4, 4, 1) == ["expert0"] * 3
    case.sam.reset()
    assert case.sam.plan is None
    assert plans_of_streams(case, 4, 4) == ["expert1"] * 2


def test_plan_manual_mode(make_case):
    case = make_case(selection="manual", min_docs=1)
    for call in (lambda: list(case.nlp.pipe(TEXTS)), lambda: case.nlp(TEXTS[0])):
        with raises("S701"):
            call()
    assert case.engines == []
    case.sam.select(TEXTS)
    assert plans_of_streams(case, 5, 5) == ["expert0"] * 2
    case.sam.reset()
    with raises("S701"):
        list(case.nlp.pipe(TEXTS))
    case.sam.plan = plan_of(case.bank, "expert2")
    assert plans_of_streams(case, 5) == ["expert2"]


def test_plan_from_select(make_case):
    case = make_case(look_ahead=3, selection="once")
    docs = [case.nlp.make_doc("Of a Doc"), "Of a text", "", "One too many"]
    plan = case.sam.select(iter(docs))
    assert case.samples == [("Of a Doc", "Of a text")]
    assert case.sam.plan is plan
    assert plans_of_streams(case, 20) == ["expert0"]
    assert case.sam.select(["Again"]) == plan_of(case.bank, "expert1")


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_plan_from_nothing(make_case, texts):
    case = make_case()
    case.sam.plan = before = plan_of(case.bank, "expert2")
    with raises("S302"):
        case.sam.select(texts)
    assert case.sam.plan is before


def test_plan_from_one_text_is_a_mistake(make_case):
    case = make_case()
    for one in ("A whole text", case.nlp.make_doc("A whole text")):
        with raises("S205"):
            case.sam.select(one)


def test_plan_for_one_call(make_case):
    nlp, sam, bank = make_case(selection="manual")
    sam.plan = own = plan_of(bank, "expert1")
    given = plan_of(bank, "expert2")
    text = "Bella and Cora"
    config = {"sam_ner": {"plan": given}}
    assert ents(nlp(text, component_cfg=config)) == names_in(text, 2)
    assert [ents(doc) for doc in nlp.pipe([text], component_cfg=config)] == [names_in(text, 2)]
    assert ents(nlp(text)) == names_in(text, 1)
    assert sam.plan is own


def test_plan_of_the_base_alone(make_case):
    nlp, sam, bank = make_case()
    doc = sam(nlp.make_doc("Bella"), plan=plan_of(bank, ()))
    assert ents(doc) == names_in("Bella")


def refuse(case: Case, plan: Plan, code: str) -> None:
    """The plan is refused wherever it is given, and nothing has changed then."""
    with raises(code):
        case.sam.plan = plan
    with raises(code):
        case.sam(case.nlp.make_doc("Anna"), plan=plan)
    pulled: List[int] = []
    with raises(code):
        next(iter(case.nlp.pipe(endless(pulled), component_cfg={"sam_ner": {"plan": plan}})))
    assert pulled == []
    assert case.sam.plan is None
    assert case.engines == []


def test_plan_of_another_bank(make_case):
    case = make_case()
    refuse(case, Plan("another", plan_of(case.bank, "expert0").task_models), "S112")


def change_expert(bank: ExpertBank) -> None:
    """`expert0` gets the weights of `expert1`."""
    name = "adapter_model.safetensors"
    shutil.copyfile(bank.folder("expert1") / name, bank.folder("expert0") / name)


def test_plan_of_a_changed_expert(bank_copy):
    case = Case(*make_nlp(bank_copy), bank_copy)
    plan = plan_of(bank_copy, ("expert0", "expert2"))
    change_expert(bank_copy)
    refuse(case, plan, "S116")
    case.sam.plan = plan_of(bank_copy, "expert1")
    assert ents(case.nlp("Bella Cora")) == names_in("Bella Cora", 1)


def test_plan_of_a_removed_expert(bank_copy):
    plan = plan_of(bank_copy, "expert0")
    bank_copy.remove("expert0")
    refuse(Case(*make_nlp(bank_copy), bank_copy), plan, "S108")


@pytest.mark.parametrize(("code", "damage"), [("S116", change_expert), ("S108", lambda bank: bank.remove("expert0"))])
def test_plan_that_was_saved_is_checked(bank_copy, tmp_path, code, damage):
    """A pipeline loads without its bank being looked at; the first use does."""
    nlp, sam = make_nlp(bank_copy, selection="once")
    sam.plan = plan_of(bank_copy, "expert0")
    nlp.to_disk(tmp_path / "model")
    damage(bank_copy)
    loaded = spacy.load(tmp_path / "model")
    other = sam_of(loaded)
    for call in (lambda: list(loaded.pipe(TEXTS)), lambda: loaded(TEXTS[0]), lambda: loaded(TEXTS[0])):
        with raises(code):
            call()
    assert engines_of(other) == []
    other.reset()
    assert len(list(loaded.pipe(TEXTS))) == len(TEXTS)


def test_single_document_without_a_plan(make_case):
    case = make_case()
    for text in ("", " \n"):
        doc = case.nlp(text)
        assert group(doc) == ents(doc) == []
    assert case.samples == []
    with pytest.warns(UserWarning, match="one document alone"):
        doc = case.nlp(TEXTS[0])
    assert ents(doc) == names_in(TEXTS[0])
    assert case.samples == [(TEXTS[0],)]
    assert ents(case.nlp(TEXTS[1])) == names_in(TEXTS[1])  # a second warning would be an error here
    case.sam.reset()
    assert ents(case.nlp("Bella Cora")) == names_in("Bella Cora", 1)
    assert len(case.samples) == 2


# Failures


class Ignore:
    """An error handler that keeps what it got."""

    def __init__(self) -> None:
        self.got: List[Tuple[str, List[str], str]] = []

    def __call__(self, name: str, component: Any, docs: Sequence[Doc], error: Exception) -> None:
        self.got.append((name, [doc.text for doc in docs], type(error).__name__))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_failing_document_is_the_only_one_lost(make_case, batch_size):
    nlp, sam, bank = make_case(batch_size=batch_size)
    sam.plan = plan_of(bank, "expert0")
    handler = Ignore()
    nlp.set_error_handler(handler)
    texts = [text + " BOOM" if n in (3, 7) else text for n, text in enumerate(TEXTS * 2)]
    docs = list(nlp.pipe(texts))
    good = [text for text in texts if "BOOM" not in text]
    assert [doc.text for doc in docs] == good
    assert [ents(doc) for doc in docs] == [group(doc) for doc in docs] == [names_in(text) for text in good]
    assert handler.got == [("sam_ner", [texts[n]], "RuntimeError") for n in (3, 7)]


def test_failing_document_raises_by_default(make_case):
    nlp, sam, bank = make_case(batch_size=3)
    sam.plan = plan_of(bank, "expert0")
    out: List[str] = []
    with pytest.raises(RuntimeError, match="fell over"):
        out.extend(doc.text for doc in nlp.pipe([*TEXTS[:4], "BOOM", TEXTS[4]]))
    assert out == TEXTS[:4]
    with pytest.raises(RuntimeError, match="fell over"):
        nlp("BOOM")


def test_failing_document_alone(make_case):
    nlp, sam, bank = make_case()
    sam.plan = plan_of(bank, "expert0")
    handler = Ignore()
    sam.set_error_handler(handler)
    doc = nlp.make_doc("Anna BOOM")
    assert sam(doc) is doc
    assert ents(doc) == []
    assert handler.got == [("sam_ner", ["Anna BOOM"], "RuntimeError")]


def test_failing_annotation_of_one_document(make_case):
    """When writing fails, the documents before it in the batch are not written twice over."""
    nlp, sam, bank = make_case(batch_size=4)
    sam.plan = plan_of(bank, "expert0")

    def picky(existing: Iterable[Span], new: Iterable[Span]) -> List[Span]:
        if any(span.text == "Cora" for span in new):
            raise ValueError("no Cora, please")
        return [*existing, *(span for span in new if span.start not in {e.start for e in existing})]

    sam.ents_filter = picky
    handler = Ignore()
    nlp.set_error_handler(handler)
    docs = list(nlp.pipe(TEXTS))
    good = [text for text in TEXTS if "Cora" not in text]
    assert [doc.text for doc in docs] == good
    assert [ents(doc) for doc in docs] == [group(doc) for doc in docs] == [names_in(text) for text in good]
    assert [texts for _, texts, _ in handler.got] == [[TEXTS[1]]]


def test_coded_errors_are_raised_and_not_handled(make_case):
    nlp, sam, bank = make_case()
    sam.plan = plan_of(bank, "expert0")
    handler = Ignore()
    nlp.set_error_handler(handler)
    with raises("S401"):
        list(nlp.pipe([*TEXTS, "CODED"]))
    with raises("S401"):
        sam(nlp.make_doc("CODED"))
    sam.reset()
    with raises("S302"):
        sam.select([" "])
    assert handler.got == []


def test_no_bank(tmp_path):
    nlp, sam = make_nlp(tmp_path / "nowhere")
    pulled: List[int] = []
    with raises("S101"):
        next(iter(nlp.pipe(endless(pulled))))
    with raises("S101"):
        nlp(TEXTS[0])
    with raises("S101"):
        sam.select(TEXTS)
    assert pulled == []
    assert engines_of(sam) == []


def half(file: Path) -> None:
    file.write_text(file.read_text()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage", "code"),
    [
        ("bank.json", half, "S102"),
        ("experts/expert1/card.json", half, "S102"),
        ("experts/expert1/card.json", Path.unlink, "S104"),
        ("experts/expert1/adapter_config.json", half, "S107"),
    ],
)
def test_half_written_bank(bank_copy, file, damage, code):
    damage(bank_copy.path / file)
    nlp, sam = make_nlp(bank_copy.path)
    pulled: List[int] = []
    with raises(code):
        next(iter(nlp.pipe(endless(pulled))))
    assert pulled == []
    assert engines_of(sam) == []


# With a real engine


REAL: Dict[str, Any] = {
    "engine": {"@misc": "spacy_sam.TorchEngine.v1", "device": "cpu"},
    "labels": list(REMEMBERED_LABELS),
}


def embed(self: SentenceEncoder, texts: Sequence[str]) -> np.ndarray:
    return np.array([[len(text), text.count("a"), 1, 1, 1, 1, 1, 1] for text in texts], dtype=np.float32)


def test_real_engine_and_strategy(remembering_bank, monkeypatch):
    """The defaults but for the sentence encoder: both selectors, TIES, the union."""
    monkeypatch.setattr(SentenceEncoder, "__call__", embed)
    nlp = spacy.blank("en")
    sam = add_sam(nlp, bank=str(remembering_bank.path), strategy={"n_experts": 1}, **REAL)
    texts = [*REMEMBERED, "", *REMEMBERED]
    docs = list(nlp.pipe(texts))
    assert [ents(doc) for doc in docs] == [group(doc) for doc in docs] == [REMEMBERED.get(text, []) for text in texts]
    plan = sam.plan
    assert plan is not None
    assert [selection.selector for selection in plan.selections] == ["domain_similarity", "sampling_evaluation"]
    assert plan.sample_size == 8
    assert dict(plan.selections[1].scores) == {"expert0": 1.0, "expert1": 1.0}
    assert plan.selections[1].details["vote"] == "majority"
    for doc in docs:
        attrs = doc.spans["sc"].attrs
        assert all(0.5 < score <= 1 for score in attrs["scores"])
        assert attrs["sources"] == [list(range(len(plan.task_models)))] * len(doc.ents)
        assert attrs["plan"] == plan.fingerprint


def test_real_engine_saved_and_loaded(remembering_bank, tmp_path):
    nlp = spacy.blank("en")
    config = {
        "bank": str(remembering_bank.path),
        "strategy": {"selectors": {"similarity": None}},
        "selection": "once",
        **REAL,
    }
    sam = add_sam(nlp, **config)
    plan = sam.select(REMEMBERED)
    assert [spec.experts for spec in plan.task_models] == [("expert0", "expert1")]
    nlp.to_disk(tmp_path / "model")
    loaded = spacy.load(tmp_path / "model")
    assert sam_of(loaded).plan == plan
    for text, expected in REMEMBERED.items():
        assert ents(loaded(text)) == ents(nlp(text)) == expected
    again = pickle.loads(pickle.dumps(sam_of(loaded)))
    docs = [loaded.make_doc(text) for text in REMEMBERED]
    assert [ents(doc) for doc in again.pipe(docs)] == list(REMEMBERED.values())


@pytest.fixture(scope="module")
def opt_bank(tmp_path_factory) -> ExpertBank:
    """Its positions are learned: a prompt that is longer than the context fails."""
    return make_tiny_bank(tmp_path_factory.mktemp("component") / "opt", n_experts=1, architecture="opt")


@pytest.mark.parametrize(
    "text",
    ["😀 " * 300, "日本語" * 300, "\n\n\n\t\t" * 300 + "x", "x" * 2000, "<|end|>" * 200, "a\u0301" * 500],
    ids=["emoji", "unspaced", "white space", "one word", "special tokens", "marks"],
)
def test_real_engine_always_has_room(opt_bank, text):
    nlp = spacy.blank("en")
    sam = add_sam(nlp, bank=str(opt_bank.path), **REAL, window_size=300, window_overlap=5)
    engine: Any = sam.parts.annotator.engine
    lengths: List[int] = []
    forward = engine.model.forward

    def measured(*args: Any, **kwargs: Any) -> Any:
        lengths.append(int(kwargs["attention_mask"].shape[1]))
        return forward(*args, **kwargs)

    engine.model.forward = measured
    engine.max_new_tokens = 2
    doc = sam(nlp.make_doc(text), plan=plan_of(opt_bank, ()))
    assert doc.text == text
    assert 0 < max(lengths) <= engine.context


def test_real_engine_labels_do_not_fit_the_context(opt_bank):
    nlp = spacy.blank("en")
    config: Dict[str, Any] = {**REAL, "bank": str(opt_bank.path), "labels": [f"{'long ' * 19}{n}" for n in range(16)]}
    sam = add_sam(nlp, **config)
    with raises("S204"):
        sam(nlp.make_doc("Anna"), plan=plan_of(opt_bank, "expert0"))
