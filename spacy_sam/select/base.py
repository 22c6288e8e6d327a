"""What selectors see and what they return: the protocol behind every ranking of experts."""

from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    runtime_checkable,
)

import numpy as np

from ..bank import ExpertBank
from ..errors import SamError
from ..plan import Selection, TaskModelSpec

Found = FrozenSet[Tuple[int, int, str]]  # strict spans of one text: (start, end, label) in characters


@dataclass(frozen=True)
class SelectionContext:
    """The target as a selector sees it.

    texts: The sample: non-empty texts of the corpus, in stream order.
    labels: The target's labels.
    bank: The experts to rank.
    encode: Texts to embeddings [n_texts, dimension], float32.
    encoder: Name of that encoder.
    annotate: A task model's strict spans for each of some texts.
    """

    texts: Tuple[str, ...]
    labels: Tuple[str, ...]
    bank: ExpertBank
    encode: Callable[[Sequence[str]], np.ndarray]
    encoder: str
    annotate: Callable[[TaskModelSpec, Sequence[str]], List[Found]]


@runtime_checkable
class Selector(Protocol):
    """Scores every expert of the bank for the target; higher is better."""

    @property
    def name(self) -> str: ...

    def __call__(self, context: SelectionContext, n_experts: int) -> Selection: ...


def make_selection(
    name: str,
    scores: Dict[str, float],
    context: SelectionContext,
    n_experts: int,
    *,
    tie_break: Iterable[str] = (),
    details: Optional[Dict[str, Any]] = None,
) -> Selection:
    """Rank scored experts: best first, equal scores in the order of `tie_break`, then by name.

    RAISES: SamError S305 if `scores` are not of exactly the bank's experts.
    """
    check_scored(name, scores, context)
    order = {expert: place for place, expert in enumerate(tie_break)}
    ranked = sorted(scores.items(), key=lambda item: (-item[1], order.get(item[0], len(order)), item[0]))
    chosen = tuple(expert for expert, _ in ranked[:n_experts])
    return Selection(name, tuple(ranked), chosen, details or {})


def check_scored(name: str, scored: Iterable[str], context: SelectionContext) -> None:
    """RAISES: SamError S305 if what a selector scored is not exactly the bank's experts."""
    found, known = sorted(scored), sorted(card.name for card in context.bank.experts)
    if found != known:
        raise SamError("S305", name=name, found=found, expected=known)
