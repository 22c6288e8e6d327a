"""Merge methods at matched norm: the same size of weight change, so that a method is not judged by its scale."""

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from benchmarks.rows import Situation
from spacy_sam.bank import ExpertBank
from spacy_sam.merge.merged import merged_deltas
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import resolve_method
from spacy_sam.select.strategies import mean_rank

# Each method at scale 1, and the norms its merges are brought to: shares of the experts' mean norm.
METHODS: Dict[str, Dict[str, Any]] = {
    "TIES, density 0.1": {"@misc": "spacy_sam.TIES.v1", "density": 0.1},
    "TIES, density 0.2": {"@misc": "spacy_sam.TIES.v1", "density": 0.2},
    "TIES, density 0.5": {"@misc": "spacy_sam.TIES.v1", "density": 0.5},
    "TIES, density 1": {"@misc": "spacy_sam.TIES.v1", "density": 1.0},
    "mean": {"@misc": "spacy_sam.Mean.v1"},
    "DARE, density 0.5": {"@misc": "spacy_sam.DARE.v1", "density": 0.5},
}
NORMS = (0.5, 0.75, 1.0, 1.5)
PLAIN: Dict[str, Dict[str, Any]] = {  # at the scales that libraries have by default
    "task arithmetic, scale 0.4": {"@misc": "spacy_sam.TaskArithmetic.v1", "scale": 0.4},
    "linear, weights 1": {"@misc": "spacy_sam.TaskArithmetic.v1", "scale": 1.0},
}


@dataclass(frozen=True)
class Matched:
    """One method at one norm (0 for "as it comes")."""

    name: str
    norm: float
    configs: Dict[Tuple[str, ...], Dict[str, Any]]

    def spec(self, at: Situation) -> TaskModelSpec:
        experts = chosen(at)
        return TaskModelSpec(experts, (), self.configs[experts])


def chosen(at: Situation) -> Tuple[str, ...]:
    """The experts that are merged: SaM-eco's three."""
    return tuple(sorted(mean_rank(at.selections())[:3]))


def matched_methods(bank: ExpertBank, places: Sequence[Situation]) -> Iterator[Matched]:
    """Every method at every norm, for the sets of experts that these places need."""
    sets = sorted({chosen(at) for at in places})
    singles = {name: _norm(bank, TaskModelSpec((name,))) for names in sets for name in names}
    for name, config in METHODS.items():
        norms = {names: _norm(bank, TaskModelSpec(names, (), {**config, "scale": 1.0})) for names in sets}
        for share in NORMS:
            wanted = {names: share * sum(singles[n] for n in names) / len(names) for names in sets}
            configs = {names: {**config, "scale": round(wanted[names] / norms[names], 4)} for names in sets}
            yield Matched(name, share, configs)
    for name, config in PLAIN.items():
        yield Matched(name, 0.0, {names: config for names in sets})


def _norm(bank: ExpertBank, spec: TaskModelSpec) -> float:
    """Frobenius norm of a task vector over all matrices."""
    adapters = {name: bank.load_adapter(name) for name in spec.experts}
    deltas = merged_deltas(adapters, spec, resolve_method(spec.method))
    squares: List[float] = [float(delta.square().sum()) for _, delta in deltas]
    return sum(squares) ** 0.5
