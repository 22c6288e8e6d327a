"""Sampling evaluation: experts annotate a few texts, a majority vote makes pseudo-labels, experts are ranked against them."""

from collections import Counter
from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Sequence, Tuple

from ..errors import check_whole
from ..plan import Selection, TaskModelSpec
from .base import Found, SelectionContext, make_selection


@dataclass(frozen=True)
class SamplingEvaluation:
    """The paper's second selector (arXiv 2506.22813): experts that agree with the experts' majority on the sample.

    Defined outcomes: a span is a pseudo-label if more than half of the experts find it (2 of 3, 3 of 4, the one of one).
    If none is found by so many, a plurality takes the vote's place: the spans found by the most experts, where that is at
    least two. Experts with equal F1 are ranked by the number of spans they share with any other expert, then by name. When
    there are still no pseudo-labels (nobody finds anything, or nobody agrees), all F1 are 0 and `details` says so.
    """

    sample_size: int = 10
    name = "sampling_evaluation"

    def __post_init__(self) -> None:
        check_whole("sample_size", self.sample_size)

    def __call__(self, context: SelectionContext, n_experts: int) -> Selection:
        """Rank the experts by micro F1 against the pseudo-labels, in [0, 1]."""
        texts = spread(context.texts, self.sample_size)
        names = [card.name for card in context.bank.experts]
        answers = {name: context.annotate(TaskModelSpec((name,)), texts) for name in names}
        pseudo, rule = pseudo_labels(list(answers.values()))
        scores = {name: micro_f1(answers[name], pseudo) for name in names}
        agreement = {name: _shared(name, answers) for name in names}
        details = {
            "n_texts": len(texts),
            "n_pseudo_labels": sum(map(len, pseudo)),
            "vote": rule,
            "n_found": {name: sum(map(len, found)) for name, found in answers.items()},
        }
        tie_break = sorted(names, key=lambda name: (-agreement[name], name))
        return make_selection(self.name, scores, context, n_experts, tie_break=tie_break, details=details)


def spread(texts: Sequence[str], size: int) -> List[str]:
    """`size` texts at even distances over the sequence, the first among them; all if there are fewer."""
    if len(texts) <= size:
        return list(texts)
    return [texts[i * len(texts) // size] for i in range(size)]


def pseudo_labels(answers: Sequence[Sequence[Found]]) -> Tuple[List[Found], str]:
    """Vote over the experts' answers.

    answers (Sequence[Sequence[Found]]): [n_experts][n_texts] sets of strict spans.
    RETURNS (Tuple[List[Found], str]): A set of spans for each text, and the rule that made them ("majority", "plurality",
        "none").
    """
    n_texts = len(answers[0])
    votes = [Counter(span for found in answers for span in found[text]) for text in range(n_texts)]
    majority = len(answers) // 2 + 1
    most = max((count for text in votes for count in text.values()), default=0)
    if most >= majority:
        return _at_least(votes, majority), "majority"
    if most >= 2:
        return _at_least(votes, most), "plurality"
    return [frozenset()] * n_texts, "none"


def _at_least(votes: Sequence[Counter], count: int) -> List[Found]:
    return [frozenset(span for span, n in text.items() if n >= count) for text in votes]


def micro_f1(found: Sequence[FrozenSet], gold: Sequence[FrozenSet]) -> float:
    """Strict-span micro F1 over texts; 0 when either side is empty."""
    correct = sum(len(f & g) for f, g in zip(found, gold))
    total = sum(map(len, found)) + sum(map(len, gold))
    return 2 * correct / total if total else 0.0


def _shared(name: str, answers: Dict[str, List[Found]]) -> int:
    others = [found for other, found in answers.items() if other != name]
    return sum(len(span_set & frozenset().union(*(o[i] for o in others))) for i, span_set in enumerate(answers[name]))
