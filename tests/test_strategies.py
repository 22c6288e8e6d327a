"""Strategies: from rankings that can be worked out by hand to plans, and what happens at the edges."""

import itertools
import json
from typing import Dict, Tuple

import pytest
from fakes import FakeBank, Fixed, Table, fake_bank, fake_context, ranks

from spacy_sam.errors import SamError
from spacy_sam.merge.methods import Mean, Ties
from spacy_sam.plan import Plan, Selection
from spacy_sam.registered import make_adaptive, make_sam, make_sam_eco
from spacy_sam.select.adaptive import Adaptive
from spacy_sam.select.base import SelectionContext, Selector
from spacy_sam.select.sampling import SamplingEvaluation
from spacy_sam.select.similarity import DomainSimilarity
from spacy_sam.select.strategies import SaM, SaMEco, Strategy


def test_sam_one_task_model_for_each_selector_in_their_order():
    context = fake_context(fake_bank("abcd"))
    plan = SaM((ranks("second", "dcba"), ranks("first", "abcd")), Ties(0.3, 0.7), 2)(context)
    assert [spec.experts for spec in plan.task_models] == [("c", "d"), ("a", "b")]
    block = {"@misc": "spacy_sam.TIES.v1", "density": 0.3, "scale": 0.7}
    assert all(spec.method == block and spec.weights == (1.0, 1.0) for spec in plan.task_models)
    assert [selection.selector for selection in plan.selections] == ["second", "first"]
    assert [selection.chosen for selection in plan.selections] == [("d", "c"), ("a", "b")]


def test_sam_same_experts_make_one_task_model():
    """Whatever their order in the rankings."""
    plan = SaM((ranks("first", "abcd"), ranks("second", "badc")), Ties(), 2)(fake_context(fake_bank("abcd")))
    assert [spec.experts for spec in plan.task_models] == [("a", "b")]
    assert len(plan.selections) == 2


def test_sam_three_selectors_keep_their_order_without_repeats():
    selectors = tuple(ranks(f"s{i}", order) for i, order in enumerate(["cdab", "abcd", "dcab"]))
    plan = SaM(selectors, Ties(), 2)(fake_context(fake_bank("abcd")))
    assert [spec.experts for spec in plan.task_models] == [("c", "d"), ("a", "b")]


@pytest.mark.parametrize("strategy", [SaM, SaMEco])
def test_strategy_more_experts_than_the_bank_has(strategy):
    plan = strategy((ranks("first", "ba"), ranks("second", "ab")), Ties(), 7)(fake_context(fake_bank("ab")))
    assert [spec.experts for spec in plan.task_models] == [("a", "b")]


@pytest.mark.parametrize("strategy", [SaM, SaMEco])
def test_strategy_plan_says_what_it_was_made_from(strategy):
    context = fake_context(fake_bank("abc"), labels=("x", "y"), texts=["one", "two", "three"])
    plan = strategy((ranks("first", "abc"), ranks("second", "acb")), Mean(), 1)(context)
    assert plan.base_hash == "base"
    assert plan.adapter_hashes == {"a": "hash of a"}
    assert plan.labels == ("x", "y")
    assert plan.sample_size == 3
    assert plan.strategy == strategy.name
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_strategy_plan_hashes_all_adapters_that_it_uses():
    plan = SaM((ranks("first", "abc"), ranks("second", "cab")), Ties(), 1)(fake_context(fake_bank("abc")))
    assert plan.adapter_hashes == {"a": "hash of a", "c": "hash of c"}


def test_eco_takes_the_best_mean_ranks():
    # Mean ranks: a (0 + 3) / 2, b (1 + 0) / 2, c (2 + 1) / 2, d (3 + 2) / 2. a and c are equal: the first selector decides.
    selectors = (ranks("first", "abcd"), ranks("second", "bcda"))
    context = fake_context(fake_bank("abcd"))
    plans = {n: SaMEco(selectors, Ties(), n)(context) for n in (1, 2, 3)}
    assert {n: [spec.experts for spec in plan.task_models] for n, plan in plans.items()} == {
        1: [("b",)],
        2: [("a", "b")],
        3: [("a", "b", "c")],
    }
    assert [spec.experts for spec in SaMEco(selectors[::-1], Ties(), 2)(context).task_models] == [("b", "c")]


def test_eco_ranks_count_and_not_scores():
    first = Fixed("first", (("a", 0.51), ("b", 0.5), ("c", 0.0)))
    second = Fixed("second", (("b", 0.1), ("a", 0.09), ("c", -9.0)))
    third = Fixed("third", (("b", 1e-6), ("c", 0.0), ("a", -1e6)))
    plan = SaMEco((first, second, third), Ties(), 1)(fake_context(fake_bank("abc")))
    assert plan.task_models[0].experts == ("b",)


STRATEGIES = [SaM, SaMEco, Adaptive]


@pytest.mark.parametrize("strategy", [SaM, SaMEco])
@pytest.mark.parametrize(("lead", "alone"), [(None, False), (0.25, True), (0.3, False), (0.0, True)])
def test_an_expert_that_is_far_ahead_stands_alone(strategy, lead, alone):
    """Ahead in the first selector's scores; the others do not matter."""
    first = Fixed("first", (("a", 0.25), ("b", 0.5), ("c", 0.0)))
    selectors = (first, ranks("second", "acb"))
    context = fake_context(fake_bank("abc"))
    plan = strategy(selectors, Ties(), 2, lead)(context)
    assert ([spec.experts for spec in plan.task_models] == [("b",)]) == alone
    if alone:
        assert {selection.chosen for selection in plan.selections} == {("b",)}, "what is shown is what is run"
    else:
        assert plan.task_models == strategy(selectors, Ties(), 2)(context).task_models
    assert len(plan.selections) == 2


@pytest.mark.parametrize("strategy", [SaM, SaMEco])
def test_an_only_expert_needs_no_lead(strategy):
    (spec,) = strategy((ranks("first", "a"),), Ties(), 3, 0.2)(fake_context(fake_bank("a"))).task_models
    assert spec.experts == ("a",)


@pytest.mark.parametrize("lead", ["0.2", True, float("nan")])
def test_strategy_bad_lead(lead):
    with pytest.raises(SamError, match=r"S205.*'lead'"):
        SaM((ranks("first", "a"),), Ties(), 3, lead)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_no_experts(strategy):
    with pytest.raises(SamError) as caught:
        strategy((ranks("first", ""),), Ties())(fake_context(fake_bank("")))
    assert caught.value.code == "S301"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_strategy_no_texts(strategy, texts):
    with pytest.raises(SamError) as caught:
        strategy((ranks("first", "ab"),), Ties())(fake_context(fake_bank("ab"), texts))
    assert caught.value.code == "S302"


class Forgetful:
    """A selector of somebody's own that makes its `Selection` itself, and forgets an expert."""

    name = "forgetful"

    def __init__(self, *scores: Tuple[str, float]) -> None:
        self.scores = scores

    def __call__(self, context: SelectionContext, n_experts: int) -> Selection:
        return Selection(self.name, self.scores, (self.scores[0][0],))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("names", [["a"], ["a", "b", "x"], ["a", "a", "b"]])
def test_strategy_selector_that_forgets_an_expert(strategy, names):
    selectors = (ranks("first", "abc"), Forgetful(*((name, 0.5) for name in names)))
    with pytest.raises(SamError) as caught:
        strategy(selectors, Ties(), 1)(fake_context(fake_bank("abc")))
    assert caught.value.code == "S305"
    assert caught.value.fields == {"name": "forgetful", "found": sorted(names), "expected": ["a", "b", "c"]}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("n_experts", [0, -1, 2.0, "3", True, None])
def test_strategy_bad_number_of_experts(strategy, n_experts):
    with pytest.raises(SamError) as caught:
        strategy((ranks("first", "ab"),), Ties(), n_experts)
    assert caught.value.code == "S205"
    assert caught.value.fields["setting"] == ("max_experts" if strategy is Adaptive else "n_experts")


@pytest.mark.parametrize("make", [make_sam, make_sam_eco, make_adaptive])
def test_strategy_selectors_in_a_config_can_be_left_out(make):
    """spaCy merges a config into the default one, so None is the way to be rid of a default selector."""
    first, second = ranks("first", "ab"), ranks("second", "ba")
    assert make({"one": first, "two": None, "three": second}, Ties()).selectors == (first, second)
    for none in ({}, {"one": None}):
        with pytest.raises(SamError) as caught:
            make(none, Ties())
        assert caught.value.code == "S205"


def test_selectors_and_strategies_keep_to_their_protocols():
    assert isinstance(DomainSimilarity(), Selector)
    assert isinstance(SamplingEvaluation(), Selector)
    for strategy in STRATEGIES:
        assert isinstance(strategy((SamplingEvaluation(),), Ties()), Strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_order_of_the_bank_does_not_matter(strategy):
    vectors = {"a": [1, 0], "b": [1, 0], "c": [0, 1], "d": [1, 1]}
    answers: Dict[str, Dict[str, list]] = {
        "a": {"one": [(0, 1, "a"), (2, 3, "b")]},
        "b": {"one": [(0, 1, "a")]},
        "c": {"one": [(2, 3, "b")]},
        "d": {},
    }
    plans = set()
    for names in itertools.permutations("abcd"):
        bank: FakeBank = fake_bank(names, vectors)
        context = fake_context(bank, annotate=Table(answers))
        plan = strategy((DomainSimilarity(), SamplingEvaluation()), Ties(), 2)(context)
        plans.add(json.dumps(plan.to_dict(), sort_keys=True))
    assert len(plans) == 1
