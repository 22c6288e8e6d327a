"""The weighted strategy: shares fall with the distance in score, and an expert that is far ahead stands alone."""

import math

import pytest
from fakes import fake_bank, fake_context
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.errors import SamError
from spacy_sam.merge.methods import Ties
from spacy_sam.plan import Selection
from spacy_sam.select.weighted import Weighted, softmax_shares

MERGE = Ties(0.3, 0.7)
names = st.dictionaries(st.sampled_from("abcdef"), st.floats(-1, 1), min_size=1)
positive = st.floats(1e-3, 10)


class Scores:
    """A selector with scores of its own."""

    name = "scores"

    def __init__(self, **scores: float) -> None:
        self.scores = scores

    def __call__(self, context, n_experts):
        ranked = sorted(self.scores.items(), key=lambda item: -item[1])
        return Selection(self.name, tuple(ranked), tuple(name for name, _ in ranked[:n_experts]))


def test_weighted_near_experts_are_merged_by_their_shares():
    scores = Scores(a=0.3, b=0.3 + 0.05 * math.log(3), c=-0.5)
    plan = Weighted(scores, MERGE, 0.05)(fake_context(fake_bank("abc")))
    (spec,) = plan.task_models
    assert dict(zip(spec.experts, spec.weights)) == pytest.approx({"a": 0.25, "b": 0.75}, rel=1e-4)
    assert spec.method == MERGE.config
    assert plan.strategy == "weighted"
    assert [name for name, _ in plan.selections[0].scores] == ["b", "a", "c"]


def test_weighted_an_expert_far_ahead_stands_alone():
    (spec,) = Weighted(Scores(a=0.1, b=0.6, c=0.2), MERGE, 0.05)(fake_context(fake_bank("abc"))).task_models
    assert (spec.experts, spec.weights, spec.method) == (("b",), (1.0,), {})


@given(names, positive, st.floats(0, 1))
def test_weighted_shares(scores, temperature, least):
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    shares = softmax_shares(ranked, temperature, least)
    assert list(shares) == [name for name, _ in ranked[: len(shares)]]
    assert 1 <= len(shares) <= len(scores)
    assert sum(shares.values()) <= 1 + 1e-9
    assert all(share >= least for share in list(shares.values())[1:])
    total = sum(math.exp(score / temperature - ranked[0][1] / temperature) for _, score in ranked)
    for name, share in shares.items():
        expected = math.exp((scores[name] - ranked[0][1]) / temperature) / total
        assert share == pytest.approx(expected if len(shares) > 1 else 1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0),
        ("temperature", -1),
        ("temperature", math.inf),
        ("temperature", "0.1"),
        ("least", -0.1),
        ("least", 1.1),
        ("least", math.nan),
        ("least", True),
    ],
)
def test_weighted_settings_are_checked(setting, value):
    with pytest.raises(SamError, match=rf"\[S205\] '{setting}'"):
        Weighted(Scores(a=1.0), MERGE, **{setting: value})


def test_weighted_is_registered():
    from spacy.util import registry

    made = registry.get("misc", "spacy_sam.Weighted.v1")(Scores(a=1.0), MERGE)
    assert made == Weighted(made.selector, MERGE, 0.2, 0.1)
