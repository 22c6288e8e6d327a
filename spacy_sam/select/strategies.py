"""From rankings to a plan: the paper's two task models, and the cheaper one-model variant."""

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple, runtime_checkable

from ..errors import SamError, check_finite, check_whole
from ..merge.methods import MergeMethod
from ..plan import Plan, Selection, TaskModelSpec
from .base import SelectionContext, Selector, check_scored


@runtime_checkable
class Strategy(Protocol):
    """Makes the plan for a target."""

    @property
    def name(self) -> str: ...

    def __call__(self, context: SelectionContext) -> Plan: ...


@dataclass(frozen=True)
class SaM:
    """The paper's way (arXiv 2506.22813): one task model for each selector, of its best `n_experts`.

    Rankings that choose the same experts make one task model, not two. The paper's appendix finds that an expert of the target's
    own domain does best by itself. So one that is ahead of all others by `lead` in the first selector's scores is the only
    task model; None never lets one stand alone, as in the paper.
    """

    selectors: Tuple[Selector, ...]
    merge: MergeMethod
    n_experts: int = 3
    lead: Optional[float] = None
    name = "SaM"

    def __post_init__(self) -> None:
        check_strategy(self.selectors, self.lead, n_experts=self.n_experts)

    def __call__(self, context: SelectionContext) -> Plan:
        """RAISES: SamError S301 or S302 if there is nothing to select from or on."""
        selections = run_selectors(self.selectors, context, self.n_experts)
        selections = leave_alone(selections, self.lead)
        chosen = dict.fromkeys(tuple(sorted(selection.chosen)) for selection in selections)
        specs = [TaskModelSpec(experts, (), dict(self.merge.config)) for experts in chosen]
        return make_plan(self.name, specs, selections, context)


@dataclass(frozen=True)
class SaMEco:
    """One task model, half the decoding: the experts with the best mean rank over the selectors.

    The paper has such a variant and does not say how it fuses the rankings; the mean of the ranks is this package's way.
    Equal mean ranks are decided by the first selector. `lead` is as in `SaM`.
    """

    selectors: Tuple[Selector, ...]
    merge: MergeMethod
    n_experts: int = 3
    lead: Optional[float] = None
    name = "SaM-eco"

    def __post_init__(self) -> None:
        check_strategy(self.selectors, self.lead, n_experts=self.n_experts)

    def __call__(self, context: SelectionContext) -> Plan:
        """RAISES: SamError S301 or S302 if there is nothing to select from or on."""
        selections = run_selectors(self.selectors, context, self.n_experts)
        experts = standing_alone(selections[0], self.lead) or tuple(mean_rank(selections)[: self.n_experts])
        selections = leave_alone(selections, self.lead)
        return make_plan(self.name, [TaskModelSpec(experts, (), dict(self.merge.config))], selections, context)


def run_selectors(selectors: Sequence[Selector], context: SelectionContext, n_experts: int) -> List[Selection]:
    """Every selector's ranking of the bank's experts.

    RAISES: SamError S301 without experts, S302 without texts, S305 if a selector does not score exactly the experts.
    """
    if not context.bank.experts:
        raise SamError("S301")
    if not any(text.strip() for text in context.texts):
        raise SamError("S302")
    selections = [selector(context, n_experts) for selector in selectors]
    for selection in selections:
        check_scored(selection.selector, (name for name, _ in selection.scores), context)
    return selections


def mean_rank(selections: Sequence[Selection]) -> List[str]:
    """Experts by the mean of their ranks, equal ones in the order of the first selection."""
    ranks: Dict[str, List[int]] = {}
    for selection in selections:
        for rank, (name, _) in enumerate(selection.scores):
            ranks.setdefault(name, []).append(rank)
    return sorted(ranks, key=lambda name: (sum(ranks[name]), ranks[name][0]))


def standing_alone(selection: Selection, lead: Optional[float]) -> Tuple[str, ...]:
    """The expert that is ahead of every other by at least `lead` in a selection's scores; empty if there is none."""
    if lead is None or len(selection.scores) < 2:
        return ()
    (name, best), (_, second) = selection.scores[:2]
    return (name,) if best - second >= lead else ()


def leave_alone(selections: Sequence[Selection], lead: Optional[float]) -> List[Selection]:
    """Selections as they are, or with the expert that stands alone as the only chosen one: what is shown is what is run."""
    alone = standing_alone(selections[0], lead)
    return [replace(selection, chosen=alone) for selection in selections] if alone else list(selections)


def make_plan(
    strategy: str, specs: Sequence[TaskModelSpec], selections: Sequence[Selection], context: SelectionContext
) -> Plan:
    """A plan for these task models, with the content hashes of the adapters it uses."""
    names = sorted({name for spec in specs for name in spec.experts})
    return Plan(
        base_hash=context.bank.base_hash,
        task_models=tuple(specs),
        adapter_hashes={name: context.bank.adapter_hash(name) for name in names},
        selections=tuple(selections),
        strategy=strategy,
        labels=context.labels,
        sample_size=len(context.texts),
    )


def check_strategy(selectors: Sequence[Any], lead: Optional[float] = None, **sizes: int) -> None:
    """RAISES: SamError S205 without selectors, for a lead that is no number, or a size that is no whole number of at least 1."""
    if lead is not None:
        check_finite("lead", lead)
    for setting, size in sizes.items():
        check_whole(setting, size)
    if not selectors:
        raise SamError("S205", setting="selectors", expected="at least one selector", found="none")
