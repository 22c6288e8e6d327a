"""Weighted selection: every expert counts as its score says, and what counts for little is left out."""

import math
from dataclasses import dataclass
from typing import Dict, Sequence, Tuple

from ..errors import SamError, check_finite
from ..merge.methods import MergeMethod
from ..plan import Plan, TaskModelSpec
from .base import SelectionContext, Selector
from .strategies import make_plan, run_selectors


@dataclass(frozen=True)
class Weighted:
    """One task model of as many experts as are near, weighted by a softmax of one selector's scores.

    The paper (arXiv 2506.22813) merges three experts with equal weights, and finds that one is best where the target is the
    domain of an expert. Here an expert that is far ahead of the others stands alone, and equally near ones are merged. Softmax
    weights of similarities without the small ones are those of TTMM (Bertolissi et al. 2025), which has them for single prompts.

    temperature: A difference of this much in the score is a factor of e in the weight.
    least: An expert with a smaller share than this is left out.
    """

    selector: Selector
    merge: MergeMethod
    temperature: float = 0.2
    least: float = 0.1
    name = "weighted"

    def __post_init__(self) -> None:
        for setting in ("temperature", "least"):
            check_finite(setting, getattr(self, setting))
        if self.temperature <= 0:
            raise SamError("S205", setting="temperature", expected="above 0", found=repr(self.temperature))
        if not 0 <= self.least <= 1:
            raise SamError("S205", setting="least", expected="between 0 and 1", found=repr(self.least))

    def __call__(self, context: SelectionContext) -> Plan:
        """RAISES: SamError S301 or S302 if there is nothing to select from or on."""
        selections = run_selectors((self.selector,), context, len(context.bank.experts))
        shares = softmax_shares(selections[0].scores, self.temperature, self.least)
        spec = TaskModelSpec(tuple(shares), tuple(shares.values()), dict(self.merge.config))
        return make_plan(self.name, [spec], selections, context)


def softmax_shares(scores: Sequence[Tuple[str, float]], temperature: float, least: float) -> Dict[str, float]:
    """The experts' shares of the softmax of their scores, without those below `least`; the best one always stays.

    scores (Sequence[Tuple[str, float]]): Names and scores, best first. temperature, least: See `Weighted`.
    RETURNS (Dict[str, float]): By name, best first; 1 for an expert that stands alone.
    """
    powers = {name: math.exp((score - scores[0][1]) / temperature) for name, score in scores}
    total = sum(powers.values())
    kept = {name: power / total for name, power in powers.items() if power / total >= least or name == scores[0][0]}
    return kept if len(kept) > 1 else dict.fromkeys(kept, 1.0)
