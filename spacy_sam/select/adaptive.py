"""Adaptive selection: merged candidates are run on the sample, and the one that the others agree with is taken."""

from dataclasses import dataclass, replace
from typing import Dict, List, Sequence, Tuple

from ..merge.methods import MergeMethod
from ..plan import Plan, Selection, TaskModelSpec
from .base import Found, SelectionContext, Selector
from .sampling import micro_f1, spread
from .strategies import check_strategy, make_plan, mean_rank, run_selectors

Experts = Tuple[str, ...]


@dataclass(frozen=True)
class Adaptive:
    """One task model of as many experts as the sample asks for.

    The paper (arXiv 2506.22813) fixes the number of experts and ranks experts, not what they merge into; it names both as
    open questions. Here the best 1, 2, ... `max_experts` of each ranking, and of their mean ranks, are merged; each of
    these candidates annotates the sample; the one with the highest mean F1 against all the others is taken. That is
    minimum Bayes risk selection (Kumar and Byrne 2004) with the candidates as the distribution of answers. Of equal ones
    the one with fewer experts is taken.
    """

    selectors: Tuple[Selector, ...]
    merge: MergeMethod
    max_experts: int = 6
    sample_size: int = 30
    name = "adaptive"

    def __post_init__(self) -> None:
        check_strategy(self.selectors, max_experts=self.max_experts, sample_size=self.sample_size)

    def __call__(self, context: SelectionContext) -> Plan:
        """RAISES: SamError S301 or S302 if there is nothing to select from or on."""
        selections = run_selectors(self.selectors, context, self.max_experts)
        texts = spread(context.texts, self.sample_size)
        answers = {experts: context.annotate(self._spec(experts), texts) for experts in self._candidates(selections)}
        scores = agreement(answers)
        best = max(scores, key=lambda experts: (scores[experts], -len(experts)))
        ranked = sorted(scores.items(), key=lambda item: -item[1])
        details = {"candidates": [{"experts": list(experts), "agreement": score} for experts, score in ranked]}
        first, *others = selections
        selections = [replace(first, details={**first.details, **details}), *others]
        return make_plan(self.name, [self._spec(best)], selections, context)

    def _spec(self, experts: Experts) -> TaskModelSpec:
        return TaskModelSpec(experts, (), dict(self.merge.config))

    def _candidates(self, selections: Sequence[Selection]) -> List[Experts]:
        orders = [[name for name, _ in selection.scores] for selection in selections] + [mean_rank(selections)]
        sizes = range(1, min(self.max_experts, len(orders[0])) + 1)
        return list(dict.fromkeys(tuple(sorted(order[:size])) for size in sizes for order in orders))


def agreement(answers: Dict[Experts, List[Found]]) -> Dict[Experts, float]:
    """Each candidate's mean F1 against the answers of the others, in [0, 1]; 0 for a candidate without others.

    answers (Dict): For each candidate its strict spans in each text of the sample.
    """
    scores: Dict[Experts, float] = {}
    for experts, found in answers.items():
        others = [micro_f1(found, other) for name, other in answers.items() if name != experts]
        scores[experts] = sum(others) / len(others) if others else 0.0
    return scores
