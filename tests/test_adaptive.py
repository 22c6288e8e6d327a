"""The adaptive strategy: which candidates are run on the sample, and which of them is taken."""

from dataclasses import replace
from typing import Any, List, Sequence, Tuple

import pytest
from fakes import Table, fake_bank, fake_context, ranks
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.merge.methods import Ties
from spacy_sam.plan import TaskModelSpec
from spacy_sam.select.adaptive import Adaptive, agreement
from spacy_sam.select.base import SelectionContext

A, B, C = (0, 1, "a"), (2, 3, "b"), (4, 5, "a")
spans = st.tuples(st.integers(0, 2), st.integers(3, 4), st.sampled_from("ab"))
found = st.frozensets(spans, max_size=4)


def asked_of(context: SelectionContext) -> Tuple[SelectionContext, List[Tuple[Tuple[str, ...], Tuple[str, ...]]]]:
    """The context, and a list that task models and texts go to when they are asked."""
    asked: List[Tuple[Tuple[str, ...], Tuple[str, ...]]] = []

    def annotate(spec: TaskModelSpec, texts: Sequence[str]) -> List[Any]:
        asked.append((spec.experts, tuple(texts)))
        return context.annotate(spec, texts)

    return replace(context, annotate=annotate), asked


def test_adaptive_takes_what_the_others_agree_with():
    answers = {
        "a": {"one": [A]},
        "b": {"one": [C]},
        "a+b": {"one": [A, B]},
        "a+c": {"one": [B]},
        "a+b+c": {"one": [B, A]},
    }
    selectors = (ranks("first", "abc"), ranks("second", "bac"))
    context, asked = asked_of(fake_context(fake_bank("abc"), annotate=Table(answers)))
    plan = Adaptive(selectors, Ties(0.3, 0.7))(context)
    assert sorted(experts for experts, _ in asked) == [("a",), ("a", "b"), ("a", "b", "c"), ("b",)]
    # Against a, b and each other: a+b and a+b+c have F1 of 2/3, 0 and 1. Of equal ones the smaller is taken.
    assert [spec.experts for spec in plan.task_models] == [("a", "b")]
    assert plan.task_models[0].method == {"@misc": "spacy_sam.TIES.v1", "density": 0.3, "scale": 0.7}
    candidates = {tuple(c["experts"]): c["agreement"] for c in plan.selections[0].details["candidates"]}
    assert candidates == pytest.approx({("a", "b"): 5 / 9, ("a", "b", "c"): 5 / 9, ("a",): 4 / 9, ("b",): 0})
    assert [selection.selector for selection in plan.selections] == ["first", "second"]


def test_adaptive_one_expert_where_it_speaks_for_all():
    answers = {"a": {"one": [A]}, "b": {"two": [B]}, "a+b": {"one": [A], "two": [B]}, "c": {"one": [A]}}
    selectors = (ranks("first", "acb"), ranks("second", "cab"))
    plan = Adaptive(selectors, Ties(), 1)(fake_context(fake_bank("abc"), annotate=Table(answers)))
    assert [spec.experts for spec in plan.task_models] == [("a",)]


@pytest.mark.parametrize("max_experts", [1, 2, 3, 9])
def test_adaptive_candidates_are_the_best_of_each_ranking(max_experts):
    selectors = (ranks("first", "abcd"), ranks("second", "dcba"))
    context, asked = asked_of(fake_context(fake_bank("abcd"), texts=[f"text {n}" for n in range(9)]))
    Adaptive(selectors, Ties(), max_experts, sample_size=3)(context)
    orders = ("abcd", "dcba", "abcd")  # the mean ranks are equal: the first selector decides
    assert {experts for experts, _ in asked} == {
        tuple(sorted(order[:n])) for order in orders for n in range(1, min(max_experts, 4) + 1)
    }
    assert len(asked) == len(set(asked))
    assert {texts for _, texts in asked} == {("text 0", "text 3", "text 6")}


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(found, min_size=2, max_size=2), min_size=1))
def test_adaptive_agreement_against_slow_version(answers):
    scores = agreement({(name,): its for name, its in answers.items()})
    for name, its in answers.items():
        f1s = []
        for other, theirs in answers.items():
            if other != name:
                both = sum(span in theirs[at] for at in range(2) for span in its[at])
                total = sum(len(its[at]) + len(theirs[at]) for at in range(2))
                f1s.append(2 * both / total if total else 0)
        assert scores[(name,)] == pytest.approx(sum(f1s) / len(f1s) if f1s else 0)
