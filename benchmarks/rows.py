"""The rows of the paper's comparison: for each target and seed, which task models run and how their answers are joined."""

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from benchmarks.predictions import Predictions, Target, f1, tallies
from spacy_sam.plan import Plan, Selection, TaskModelSpec
from spacy_sam.registered import make_adaptive, make_domain_similarity, make_mean, make_sampling_evaluation
from spacy_sam.select.base import SelectionContext
from spacy_sam.select.strategies import mean_rank, standing_alone
from spacy_sam.select.weighted import Weighted, softmax_shares
from spacy_sam.settings import LEAD

LOOK_AHEAD = 100  # texts that similarity sees: the component's default
SAMPLE_SIZE = 10  # texts that the experts annotate: the paper's and the default


@dataclass(frozen=True)
class Choice:
    """What one row runs on one target. agree: how many task models must find a span."""

    specs: Tuple[TaskModelSpec, ...]
    agree: int = 1


@dataclass(frozen=True)
class Row:
    """A line of the table. choose: from a situation to what is run. oracle: it is chosen by the target's labels."""

    name: str
    choose: Callable[["Situation"], Choice]
    oracle: bool = False


class Situation:
    """One target and one seed: a sample of the target's texts, and what the selectors say of it."""

    def __init__(self, predictions: Predictions, target: Target, seed: int, merge: Any) -> None:
        self.predictions = predictions
        self.target = target
        self.seed = seed
        self.merge = merge
        self.experts = [card.name for card in predictions.bank.experts]
        self._selections: Dict[Tuple[int, int], List[Selection]] = {}

    def sample(self, size: int) -> List[str]:
        """A random sample of the texts; a larger one begins with the smaller one."""
        texts = list(self.target.texts)
        random.Random(self.seed).shuffle(texts)
        return texts[:size]

    def context(self, size: int = LOOK_AHEAD) -> SelectionContext:
        return self.predictions.context(self.target, self.sample(size))

    def selections(self, look_ahead: int = LOOK_AHEAD, sample_size: int = SAMPLE_SIZE) -> List[Selection]:
        """The rankings by similarity and by sampling evaluation."""
        key = (look_ahead, sample_size)
        if key not in self._selections:
            context = self.context(look_ahead)
            selectors = (make_domain_similarity(), make_sampling_evaluation(sample_size))
            self._selections[key] = [selector(context, len(self.experts)) for selector in selectors]
        return self._selections[key]

    def spec(self, experts: Sequence[str], merge: Any = None, weights: Sequence[float] = ()) -> TaskModelSpec:
        return TaskModelSpec(tuple(experts), tuple(weights), dict((merge or self.merge).config))

    def tally(self, choice: Choice) -> np.ndarray:
        found = self.predictions.entities(choice.specs, self.target, choice.agree)
        return tallies(found, self.predictions.golds(self.target))

    def f1(self, choice: Choice) -> float:
        return float(f1(self.tally(choice).sum(0)))


def one(name: str) -> Callable[[Situation], Choice]:
    return lambda at: Choice((at.spec([name]),))


def sam(
    n_experts: int = 3,
    which: Sequence[int] = (0, 1),
    agree: int = 1,
    look_ahead: int = LOOK_AHEAD,
    sample_size: int = SAMPLE_SIZE,
    merge: Any = None,
    lead: Optional[float] = None,
) -> Callable[[Situation], Choice]:
    """A task model of each chosen ranking's best (0: similarity, 1: sampling); equal ones are run once.

    lead (Optional[float]): An expert that is ahead by so much in the first ranking stands alone.
    """

    def choose(at: Situation) -> Choice:
        selections = [at.selections(look_ahead, sample_size)[number] for number in which]
        if alone := standing_alone(selections[0], lead):
            return Choice((at.spec(alone),))
        best = dict.fromkeys(tuple(sorted(name for name, _ in s.scores[:n_experts])) for s in selections)
        return Choice(tuple(at.spec(experts, merge) for experts in best), min(agree, len(best)))

    return choose


def eco(n_experts: int = 3, merge: Any = None) -> Callable[[Situation], Choice]:
    return lambda at: Choice((at.spec(mean_rank(at.selections())[:n_experts], merge),))


def weighted(
    temperature: float = Weighted.temperature, merge: Any = None, least: float = 0.1
) -> Callable[[Situation], Choice]:
    """Experts weighted by a softmax of their similarities, without those that would have less than `least`."""

    def choose(at: Situation) -> Choice:
        shares = softmax_shares(at.selections()[0].scores, temperature, least)
        return Choice((at.spec(tuple(shares), merge, tuple(shares.values())),))

    return choose


def at_random(n_experts: int = 3) -> Callable[[Situation], Choice]:
    return lambda at: Choice((at.spec(random.Random(f"{at.target.name} {at.seed}").sample(at.experts, n_experts)),))


def oracle(sizes: Sequence[int]) -> Callable[[Situation], Choice]:
    """The single task model with the highest F1, of all sets of experts of some sizes."""

    def choose(at: Situation) -> Choice:
        options = [Choice((at.spec(names),)) for size in sizes for names in combinations(at.experts, size)]
        return max(options, key=at.f1)

    return choose


def adaptive() -> Callable[[Situation], Choice]:
    """What the package's adaptive strategy plans for the sample."""

    def choose(at: Situation) -> Choice:
        selectors = {"similarity": make_domain_similarity(), "sampling": make_sampling_evaluation(SAMPLE_SIZE)}
        plan: Plan = make_adaptive(selectors, at.merge)(at.context())
        return Choice(plan.task_models)

    return choose


def main_rows(predictions: Predictions, subsets: bool = True) -> List[Row]:
    """The table's rows. subsets: With the best of all sets of up to three experts, which runs them all."""
    experts = [card.name for card in predictions.bank.experts]
    rows = [Row("base", lambda at: Choice((TaskModelSpec(),)))]
    rows += [Row(card.name, one(card.name)) for card in predictions.bank.baselines]
    rows += [Row(name, one(name)) for name in experts]
    rows += [
        Row("best single expert (oracle)", oracle([1]), oracle=True),
        Row("first by similarity", sam(1, [0])),
        Row("first by sampling", sam(1, [1])),
        Row("first by mean rank", eco(1)),
        Row("three at random", at_random()),
        Row("all merged", lambda at: Choice((at.spec(at.experts),))),
        Row("SaM, similarity alone", sam(which=[0])),
        Row("SaM, sampling alone", sam(which=[1])),
        Row("SaM", sam()),
        Row("SaM, intersection", sam(agree=2)),
        Row("SaM, lead", sam(lead=LEAD)),
        Row("SaM-eco", eco()),
        Row("adaptive", adaptive()),
        Row("weighted, TIES", weighted()),
        Row("weighted", weighted(merge=make_mean(1.0))),
    ]
    if subsets:
        rows.append(Row("best of at most three (oracle)", oracle([1, 2, 3]), oracle=True))
    return rows
