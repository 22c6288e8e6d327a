"""Selectors: rankings that can be worked out by hand, and what happens at the edges."""

import itertools
from dataclasses import replace
from typing import Any, List, Mapping, Sequence

import numpy as np
import pytest
from fakes import Table, fake_bank, fake_context
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.errors import SamError
from spacy_sam.plan import Centroid, Selection, TaskModelSpec
from spacy_sam.registered import make_sampling_evaluation
from spacy_sam.select.base import make_selection
from spacy_sam.select.sampling import SamplingEvaluation, micro_f1, pseudo_labels, spread
from spacy_sam.select.similarity import DomainSimilarity, cosine, make_centroid
from spacy_sam.select.types import TypeSimilarity

A, B, C, D = (0, 1, "a"), (2, 3, "b"), (4, 5, "a"), (6, 7, "b")
spans = st.tuples(st.integers(0, 2), st.integers(3, 4), st.sampled_from("ab"))
found = st.frozensets(spans, max_size=4)


def encode_as(vectors: Mapping[str, Sequence[float]]) -> Any:
    return lambda texts: np.array([vectors[text] for text in texts], dtype=np.float32)


# Entity-type similarity


def typed(bank: Any, **labels: Sequence[str]) -> Any:
    bank.experts = [replace(card, labels=tuple(labels[card.name])) for card in bank.experts]
    return bank


def test_type_similarity_is_the_mean_of_the_nearest():
    bank = typed(fake_bank("abc"), a=["man", "town"], b=["town"], c=[])
    vectors = {"person": [2, 0], "city": [0, 1], "man": [3, 4], "town": [0, 5]}
    context = fake_context(bank, labels=("person", "city"), encode=encode_as(vectors))
    selection = TypeSimilarity()(context, 1)
    assert dict(selection.scores) == pytest.approx({"a": (0.6 + 1) / 2, "b": (0 + 1) / 2, "c": 0})
    assert (selection.selector, selection.chosen) == ("type_similarity", ("a",))
    assert selection.details["nearest"]["a"] == {"person": "man", "city": "town"}


def test_type_similarity_of_zero_vectors_is_zero():
    bank = typed(fake_bank("ab"), a=["x"], b=["y"])
    context = fake_context(bank, labels=("z",), encode=encode_as({"x": [0, 0], "y": [1, 0], "z": [0, 0]}))
    assert TypeSimilarity()(context, 1).scores == (("a", 0.0), ("b", 0.0))


# Domain similarity


def test_similarity_is_the_cosine_of_means():
    bank = fake_bank("abcd", {"a": [1, 0], "b": [0, 8], "c": [-3, -4], "d": [0, 0]})
    context = fake_context(bank, encode=encode_as({"one": [3, 0], "two": [0, 8]}))  # the mean is [1.5, 4]
    selection = DomainSimilarity()(context, 2)
    norm = (1.5**2 + 4**2) ** 0.5
    expected = {"b": 4 / norm, "a": 1.5 / norm, "d": 0.0, "c": -(1.5 * 3 + 4 * 4) / (5 * norm)}
    assert dict(selection.scores) == pytest.approx(expected)
    assert [name for name, _ in selection.scores] == ["b", "a", "d", "c"]
    assert selection.chosen == ("b", "a")
    assert selection.selector == "domain_similarity"


def test_similarity_means_are_of_unnormalised_embeddings():
    bank = fake_bank("ab", {"a": [1, 0], "b": [0, 1]})
    context = fake_context(bank, encode=encode_as({"one": [1, 0], "two": [0, 5]}))
    assert dict(DomainSimilarity()(context, 1).scores) == pytest.approx({"a": 1 / 26**0.5, "b": 5 / 26**0.5})


def test_similarity_zero_sample_ranks_by_name():
    bank = fake_bank("ba", {"a": [1, 0], "b": [0, 1]})
    context = fake_context(bank, encode=encode_as({"one": [0, 0], "two": [0, 0]}))
    assert DomainSimilarity()(context, 1).scores == (("a", 0.0), ("b", 0.0))


@pytest.mark.parametrize(
    ("centroid", "known"),
    [
        (None, "none"),
        (Centroid("another", 5, (1.0, 0.0)), "another"),
        (Centroid("fake", 5, (1.0, 0.0, 0.0)), "fake"),
    ],
)
def test_similarity_centroid_of_another_encoder(centroid, known):
    bank = fake_bank("ab", {"a": [1, 0], "b": [0, 1]})
    bank.experts[1] = replace(bank.experts[1], centroid=centroid)
    with pytest.raises(SamError) as caught:
        DomainSimilarity()(fake_context(bank), 1)
    assert caught.value.code == "S304"
    assert caught.value.fields == {"name": "b", "encoder": "fake", "known": known}


numbers = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
vectors = st.lists(numbers, min_size=3, max_size=3).map(lambda v: np.array(v, dtype=np.float32))


@given(vectors, vectors, st.floats(0.01, 100))
def test_cosine_has_no_scale(first, second, scale):
    value = cosine(first, second)
    assert -1.0001 <= value <= 1.0001
    assert cosine(second, first) == pytest.approx(value, abs=1e-6)
    assert cosine(first * np.float32(scale), second) == pytest.approx(value, abs=1e-4)
    assert cosine(first, first) == pytest.approx(1.0 if first.any() else 0.0, abs=1e-6)


def test_centroid_is_the_mean_of_the_texts():
    centroid = make_centroid(np.array([[1, 2], [3, 4], [5, 9]], dtype=np.float32), "fake")
    assert centroid == Centroid("fake", 3, (3.0, 5.0))
    bank = fake_bank("a")
    bank.experts[0] = replace(bank.experts[0], centroid=centroid)
    context = fake_context(bank, encode=encode_as({"one": [3, 5], "two": [3, 5]}))
    assert dict(DomainSimilarity()(context, 1).scores) == pytest.approx({"a": 1.0})


# Sampling evaluation


def evaluate(answers: Mapping[str, Mapping[str, Sequence[Any]]], **fields: Any) -> Selection:
    context = fake_context(fake_bank(list(answers)), annotate=Table(answers), **fields)
    return SamplingEvaluation()(context, 2)


def test_sampling_majority():
    selection = evaluate(
        {
            "a": {"one": [A, B], "two": [C]},  # both pseudo-labels, one span of its own: 2 * 2 / (3 + 2)
            "b": {"one": [A], "two": [C]},  # exactly the pseudo-labels
            "c": {"one": [], "two": [D]},  # nothing right
        }
    )
    assert dict(selection.scores) == pytest.approx({"a": 4 / 5, "b": 1.0, "c": 0.0})
    assert selection.chosen == ("b", "a")
    assert selection.details == {
        "n_texts": 2,
        "n_pseudo_labels": 2,
        "vote": "majority",
        "n_found": {"a": 3, "b": 2, "c": 1},
    }


def test_sampling_half_is_no_majority():
    """Two of four are a plurality, and so are not outvoted by spans that only one finds."""
    selection = evaluate({"a": {"one": [A]}, "b": {"one": [A, B]}, "c": {"one": [C]}, "d": {}})
    assert dict(selection.scores) == pytest.approx({"a": 1.0, "b": 2 / 3, "c": 0.0, "d": 0.0})
    assert selection.details["vote"] == "plurality"
    assert selection.details["n_pseudo_labels"] == 1


def test_sampling_majority_drops_what_fewer_find():
    selection = evaluate({"a": {"one": [A, B]}, "b": {"one": [A, B]}, "c": {"one": [A]}, "d": {}})
    assert selection.details["n_pseudo_labels"] == 1
    assert dict(selection.scores) == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 1.0, "d": 0.0})


def test_sampling_same_span_in_another_text_is_another_span():
    selection = evaluate({"a": {"one": [A]}, "b": {"two": [A]}, "c": {}})
    assert selection.details["vote"] == "none"


@pytest.mark.parametrize(
    ("answers", "n_found"),
    [
        ({"b": {}, "a": {}, "c": {}}, {"a": 0, "b": 0, "c": 0}),
        ({"b": {"one": [A]}, "a": {"one": [B]}, "c": {"two": [A]}}, {"a": 1, "b": 1, "c": 1}),
    ],
    ids=["nobody finds anything", "nobody agrees"],
)
def test_sampling_without_pseudo_labels(answers, n_found):
    selection = evaluate(answers)
    assert selection.scores == (("a", 0.0), ("b", 0.0), ("c", 0.0))
    assert selection.chosen == ("a", "b")
    assert selection.details == {"n_texts": 2, "n_pseudo_labels": 0, "vote": "none", "n_found": n_found}


def test_sampling_one_expert_is_its_own_majority():
    selection = evaluate({"a": {"one": [A]}})
    assert selection.scores == (("a", 1.0),)
    assert selection.chosen == ("a",)
    assert selection.details["vote"] == "majority"


def test_sampling_equal_scores_go_by_shared_spans_then_name():
    selection = evaluate(
        {
            "a": {"one": [A]},
            "b": {"one": [A]},
            "c": {"one": [A]},
            "d": {"two": [B, (10, 11, "a"), (12, 13, "a")]},  # finds the most, and shares nothing
            "e": {"two": [C, D]},  # shares both with f
            "f": {"two": [C, D]},
        }
    )
    # A has three of six votes, which is no majority: it wins as the plurality.
    assert selection.details["vote"] == "plurality"
    assert [name for name, _ in selection.scores] == ["a", "b", "c", "e", "f", "d"]


def test_sampling_asks_each_expert_alone_for_the_same_texts():
    asked: List[Any] = []

    def annotate(spec: TaskModelSpec, texts: Sequence[str]) -> List[frozenset]:
        asked.append((spec, list(texts)))
        return [frozenset() for _ in texts]

    texts = [f"text {i}" for i in range(25)]
    selection = SamplingEvaluation(5)(fake_context(fake_bank("ab"), texts, annotate=annotate), 1)
    sample = ["text 0", "text 5", "text 10", "text 15", "text 20"]
    assert asked == [(TaskModelSpec(("a",)), sample), (TaskModelSpec(("b",)), sample)]
    assert selection.details["n_texts"] == 5


def test_sampling_takes_all_of_fewer_texts():
    assert evaluate({"a": {}}, texts=["one", "two", "three"]).details["n_texts"] == 3


@pytest.mark.parametrize("size", [0, -1, 2.5, "10", True, None])
def test_sampling_bad_size(size):
    with pytest.raises(SamError) as caught:
        make_sampling_evaluation(size)
    assert caught.value.code == "S205"


@given(st.lists(st.integers(), max_size=60), st.integers(1, 30))
def test_spread_against_slow_version(texts, size):
    n, n_taken = len(texts), min(len(texts), size)
    # The last place that is not beyond i of `n_taken` equal parts.
    places = [max(place for place in range(n) if place * n_taken <= i * n) for i in range(n_taken)]
    assert spread(texts, size) == [texts[place] for place in places]
    gaps = np.diff(places)
    assert not len(gaps) or 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(found, min_size=2, max_size=2), min_size=n, max_size=n)))
def test_pseudo_labels_against_slow_version(answers):
    votes = {
        (text, span): sum(span in expert[text] for expert in answers)
        for text in range(2)
        for span in itertools.product(range(3), (3, 4), "ab")
    }
    winners, rule = {key for key, n in votes.items() if n * 2 > len(answers)}, "majority"
    if not winners:
        most = max(votes.values())
        winners, rule = {key for key, n in votes.items() if n == most and n > 1}, "plurality"
    if not winners:
        rule = "none"
    assert pseudo_labels(answers) == ([{span for t, span in winners if t == text} for text in range(2)], rule)


@given(st.lists(st.tuples(found, found), min_size=1, max_size=4))
def test_micro_f1_against_slow_version(pairs):
    right = wrong = missed = 0
    for guess, gold in pairs:
        for span in guess | gold:
            right += span in guess and span in gold
            wrong += span in guess and span not in gold
            missed += span not in guess and span in gold
    precision = right / (right + wrong) if right else 0.0
    recall = right / (right + missed) if right else 0.0
    expected = 2 * precision * recall / (precision + recall) if right else 0.0
    assert micro_f1([guess for guess, _ in pairs], [gold for _, gold in pairs]) == pytest.approx(expected)


# Selections


@pytest.mark.parametrize("scores", [{"a": 1.0}, {"a": 1.0, "b": 0.5, "c": 0.2}, {}])
def test_selection_scores_every_expert_and_no_other(scores):
    with pytest.raises(SamError) as caught:
        make_selection("mine", scores, fake_context(fake_bank("ab")), 1)
    assert caught.value.code == "S305"
    assert caught.value.fields == {"name": "mine", "found": sorted(scores), "expected": ["a", "b"]}


def test_selection_tie_break_comes_before_the_name():
    context = fake_context(fake_bank("abcd"))
    scores = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.9}
    selection = make_selection("mine", scores, context, 3, tie_break=["c", "b"])
    assert [name for name, _ in selection.scores] == ["d", "c", "b", "a"]
    assert selection.chosen == ("d", "c", "b")
