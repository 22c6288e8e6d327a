"""More merge methods on dense task vectors: each drops entries in a way of its own, and combines what stays.

Arguments, dtypes and the rule for a stack of one are those of `methods`. All work on one matrix at a time.
"""

from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor

from ..errors import SamError
from .methods import disjoint_mean, elect_signs
from .stacks import check_density, check_scale, drop, is_number, largest, mean_one, prepare, weighted_sum

COMBINATIONS = ("ties", "linear")


@dataclass(frozen=True)
class DareTies:
    """DARE, then TIES without its trimming; see `dare_ties`. RAISES: SamError S401 for a bad density or scale."""

    density: float = 0.5
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.DARETIES.v1", "density": self.density, "scale": self.scale, "seed": self.seed}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return dare_ties(task_vectors, weights, self.density, self.scale, self.seed)


@dataclass(frozen=True)
class Della:
    """DELLA; see `della`. RAISES: SamError S401 for a bad density, window, scale or combination."""

    density: float = 0.7
    window: float = 0.14
    scale: float = 1.1
    seed: int = 0
    combine: str = "ties"

    def __post_init__(self) -> None:
        _check_window(self.density, self.window)
        check_scale(self.scale)
        _check_combination(self.combine)

    @property
    def config(self) -> Dict[str, Any]:
        settings = {"density": self.density, "window": self.window, "scale": self.scale, "seed": self.seed}
        return {"@misc": "spacy_sam.DELLA.v1", **settings, "combine": self.combine}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return della(task_vectors, weights, self.density, self.window, self.scale, self.seed, self.combine)


@dataclass(frozen=True)
class Breadcrumbs:
    """Model Breadcrumbs; see `breadcrumbs`. RAISES: SamError S401 for a bad density, gamma or scale."""

    density: float = 0.15
    gamma: float = 0.006
    scale: float = 0.2

    def __post_init__(self) -> None:
        _check_gamma(self.density, self.gamma)
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        settings = {"density": self.density, "gamma": self.gamma, "scale": self.scale}
        return {"@misc": "spacy_sam.Breadcrumbs.v1", **settings}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return breadcrumbs(task_vectors, weights, self.density, self.gamma, self.scale)


@dataclass(frozen=True)
class Pcb:
    """PCB-merging; see `pcb`. RAISES: SamError S401 for a bad density or scale."""

    density: float = 0.1
    scale: float = 1.2

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.PCB.v1", "density": self.density, "scale": self.scale}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return pcb(task_vectors, weights, self.density, self.scale)


def dare_ties(
    task_vectors: Tensor,
    weights: Optional[Sequence[float]] = None,
    density: float = 0.5,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Drop entries at random and rescale the rest by 1 / density (DARE, Yu et al. 2023,
    https://arxiv.org/abs/2311.03099), then elect signs and average what agrees, as TIES does.

    There is no trimming besides: this is what peft and mergekit call `dare_ties`. What is dropped depends on the seed and
    on each task vector's own values. Other arguments, result and errors as in `methods.ties`.

    density (float): The chance of an entry to be kept, above 0 and up to 1.
    seed (int): Of the choice.
    """
    check_density(density)
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    dropped = torch.stack([drop(vector, density, seed) for vector in vectors])
    return scale * disjoint_mean(dropped, elect_signs(dropped, relative), relative)


def della(
    task_vectors: Tensor,
    weights: Optional[Sequence[float]] = None,
    density: float = 0.7,
    window: float = 0.14,
    scale: float = 1.1,
    seed: int = 0,
    combine: str = "ties",
) -> Tensor:
    """Drop entries by chance, small ones sooner, and elect and average the rest (DELLA, Deep et al. 2024,
    https://arxiv.org/abs/2406.11617): MagPrune (`keep_chances`), where each survivor is divided by its own chance to be
    kept, then TIES' election and mean.

    Other arguments, result and errors as in `methods.ties`.

    density (float): The mean chance of an entry to be kept, above 0 and up to 1.
    window (float): The chance of a row's largest entry less that of its smallest, from 0 (DARE); both chances must be
        above 0 and at most 1. It is 2 epsilon in mergekit.
    seed (int): Of the choice.
    combine (str): "ties", as in the paper, or "linear": sum as `task_arithmetic` does.
    """
    _check_window(density, window)
    _check_combination(combine)
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    dropped = torch.stack([drop(vector, keep_chances(vector, density, window), seed) for vector in vectors])
    if combine == "linear":
        return scale * weighted_sum(dropped, mean_one(relative))
    return scale * disjoint_mean(dropped, elect_signs(dropped, relative), relative)


def keep_chances(vector: Tensor, density: float, window: float) -> Tensor:
    """MagPrune's chances: from density - window / 2 for a row's smallest magnitude to density + window / 2 for its largest,
    in equal steps by rank. Of equal magnitudes the first has the lower rank. An entry alone in its row has `density`.

    vector (Tensor): `[..., columns]`, one task vector; rows are along the last dimension.
    RETURNS (Tensor): `[..., columns]`.
    """
    rows = vector.abs().reshape(-1, vector.shape[-1] if vector.dim() else 1)
    n_columns = rows.shape[1]
    if n_columns == 1:
        return torch.full_like(vector, density)
    steps = torch.linspace(0, 1, n_columns, dtype=vector.dtype, device=vector.device).expand(rows.shape)
    position = torch.empty_like(rows).scatter_(1, rows.argsort(dim=1, stable=True), steps)
    return (density - window / 2 + window * position).reshape(vector.shape)


def breadcrumbs(
    task_vectors: Tensor,
    weights: Optional[Sequence[float]] = None,
    density: float = 0.15,
    gamma: float = 0.006,
    scale: float = 0.2,
) -> Tensor:
    """Drop the largest and the smallest entries, and sum (Model Breadcrumbs, Davari and Belilovsky 2023,
    https://arxiv.org/abs/2312.06795).

    Of each task vector the `int(gamma * numel)` largest magnitudes go, the next `int(density * numel)` stay, without
    rescaling. The sum is weighted as in `task_arithmetic`. Other arguments, result and errors as in `methods.ties`.

    density (float): The share that stays, above 0 and up to 1.
    gamma (float): The share of largest entries that go, from 0 to 1 - density.
    """
    _check_gamma(density, gamma)
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    size = vectors[0].numel()
    n_top, n_keep = int(gamma * size), int(density * size)
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, mean_one(relative)):
        kept = largest(vector, min(n_top + n_keep, size)) & ~largest(vector, n_top)
        total += weight * torch.where(kept, vector, 0)
    return scale * total


def pcb(
    task_vectors: Tensor, weights: Optional[Sequence[float]] = None, density: float = 0.1, scale: float = 1.2
) -> Tensor:
    """Weigh each entry by how large it is in its task vector and how well it agrees with the sum of all (PCB-merging, Du et
    al. 2024, https://arxiv.org/abs/2410.02396).

    The score of an entry t of task vector tau is exp(n * s^2) * tanh(t * sum of t over the experts), where s is |t| brought
    to 0 .. 1 in tau. The top `density` of the scores are brought to 0 .. 1, the others are 0: these are the entry's weights
    in a mean. As in the authors' code, magnitudes are clipped first to those at ranks .0001 and .9999. Experts' weights
    count in the sum and in the mean. Other arguments, result and errors as in `methods.ties`.

    density (float): The share of entries that have a score above 0, above 0 and up to 1.
    """
    check_density(density)
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    weights = mean_one(relative)
    total = weighted_sum(vectors, weights)
    numerator, denominator = torch.zeros_like(total), torch.zeros_like(total)
    for vector, weight in zip(vectors, weights):
        clipped = _clip_magnitudes(vector)
        score = weight * _balance(clipped.abs(), vector * total, len(vectors), density)
        numerator += score * clipped
        denominator += score
    return scale * (numerator / denominator.clamp(min=1e-12))


def _clip_magnitudes(vector: Tensor) -> Tensor:
    magnitude, size = vector.abs(), vector.numel()
    low = _at_rank(magnitude, int(size * 0.0001))
    high = _at_rank(magnitude, int(size * (1 - 0.0001) - 1))
    return vector.sign() * magnitude.clamp(low, high)


def _balance(magnitude: Tensor, agreement: Tensor, n_experts: int, density: float) -> Tensor:
    """Scores of one task vector's entries, 0 to 1."""
    spread = magnitude.max() - magnitude.min()
    share = (magnitude - magnitude.min()) / spread if spread > 0 else torch.zeros_like(magnitude)
    # Less 1: a common factor, which what follows does not see, so that many experts do not overflow.
    score = torch.exp(n_experts * (share.square() - 1)) * torch.tanh(agreement)
    border = _at_rank(score, int(score.numel() * (1 - density)))
    if score.max() > border:
        return ((score - border) / (score.max() - border)).clamp(min=0)
    # The top share is one entry, or several with one score: 0 / 0 in the authors' code.
    return ((score >= border) & (magnitude > 0)).to(score.dtype)


def _at_rank(values: Tensor, index: int) -> Tensor:
    """The value at a place in ascending order."""
    return values.reshape(-1).kthvalue(min(max(index, 0), values.numel() - 1) + 1).values


def _check_window(density: float, window: float) -> None:
    check_density(density)
    if not (is_number(window) and window >= 0 and density - window / 2 > 0 and density + window / 2 <= 1 + 1e-9):
        expected = "at least 0, with density - window / 2 above 0 and density + window / 2 at most 1"
        raise SamError("S401", name="window", expected=expected, found=repr(window))


def _check_gamma(density: float, gamma: float) -> None:
    check_density(density)
    if not (is_number(gamma) and gamma >= 0 and density + gamma <= 1 + 1e-9):
        raise SamError("S401", name="gamma", expected="from 0 to 1 - density", found=repr(gamma))


def _check_combination(combine: str) -> None:
    if combine not in COMBINATIONS:
        raise SamError("S401", name="combine", expected=f"one of {', '.join(COMBINATIONS)}", found=repr(combine))
