"""Merge methods: pure functions on stacked task vectors, and the same as frozen settings for configs.

Everywhere: `task_vectors` is `[n_experts, ...]`, one matrix's weight change by each expert. The mathematics is done,
and the result returned, in float32 (float64 if that comes in), `[...]`. Weights are relative: finite, above 0, and only
their proportions matter. The size of the result is set by `scale`. Trimming and scale are there against the
interference of several experts: a stack of one comes back as it is, whatever the settings.
"""

from dataclasses import dataclass
from typing import Any, Dict, Optional, Protocol, Sequence, runtime_checkable

import torch
from torch import Tensor

from ..errors import SamError
from .stacks import as_stack, check_density, check_scale, drop, largest, prepare, relative_weights, weighted_sum

TRIMS = ("matrix", "global")


@runtime_checkable
class MergeMethod(Protocol):
    """Merges one matrix. `config` is the block that makes it again: `{"@misc": name, ...}`."""

    @property
    def config(self) -> Dict[str, Any]: ...

    def __call__(self, task_vectors: Tensor, weights: Sequence[float]) -> Tensor: ...


@dataclass(frozen=True)
class Ties:
    """TIES; see `ties`.

    trim: "matrix" keeps a share of each matrix. "global" keeps a share of each expert's whole task vector, as the
        paper does: of all matrices together that any of the experts changes, those of equal magnitude at the border in
        their order. `merge.streaming` finds the borders; a call merges a stack of whole, flattened task vectors.
    RAISES: SamError S401 for a bad density, scale or trim.
    """

    density: float = 0.2
    scale: float = 1.0
    trim: str = "matrix"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)
        if self.trim not in TRIMS:
            raise SamError("S401", name="trim", expected=f"one of {TRIMS}", found=repr(self.trim))

    @property
    def config(self) -> Dict[str, Any]:
        """Without the default of `trim`, so that plans from before there was a choice stay the same."""
        chosen = {} if self.trim == "matrix" else {"trim": self.trim}
        return {"@misc": "spacy_sam.TIES.v1", "density": self.density, "scale": self.scale, **chosen}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return ties(task_vectors, weights, self.density, self.scale)


@dataclass(frozen=True)
class Mean:
    """Weighted mean; see `mean`. RAISES: SamError S401 for a bad scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.Mean.v1", "scale": self.scale}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return mean(task_vectors, weights, self.scale)


@dataclass(frozen=True)
class TaskArithmetic:
    """Scaled sum; see `task_arithmetic`. RAISES: SamError S401 for a bad scale."""

    scale: float = 0.4

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.TaskArithmetic.v1", "scale": self.scale}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return task_arithmetic(task_vectors, weights, self.scale)


@dataclass(frozen=True)
class Dare:
    """DARE; see `dare`. RAISES: SamError S401 for a bad density or scale."""

    density: float = 0.5
    scale: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.DARE.v1", "density": self.density, "scale": self.scale, "seed": self.seed}

    def __call__(self, task_vectors: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
        return dare(task_vectors, weights, self.density, self.scale, self.seed)


def ties(
    task_vectors: Tensor, weights: Optional[Sequence[float]] = None, density: float = 0.2, scale: float = 1.0
) -> Tensor:
    """Trim, elect signs, and average what agrees (TIES-merging, Yadav et al. 2023, https://arxiv.org/abs/2306.01708).

    At equal weights this is the paper's merge with the trimming done per matrix. Weights count both in the election
    and in the mean, where they are divided by the sum of those that agree.

    task_vectors (Tensor): `[n_experts, ...]`, any floating dtype.
    weights (Optional[Sequence[float]]): One for each expert, relative; None for equal ones.
    density (float): The share of each task vector that is kept, above 0 and up to 1.
    scale (float): Multiplies the result (the paper's lambda), above 0.
    RETURNS (Tensor): `[...]`.
    RAISES: SamError S401 for bad weights, density, scale or an empty stack, S407 for NaN and infinite values.
    """
    check_density(density)
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    trimmed = trim(vectors, density)
    return scale * disjoint_mean(trimmed, elect_signs(trimmed, relative), relative)


def mean(task_vectors: Tensor, weights: Optional[Sequence[float]] = None, scale: float = 1.0) -> Tensor:
    """Weighted mean times `scale`. Arguments, result and errors as in `ties`."""
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    return scale * (weighted_sum(vectors, relative) / sum(relative))


def task_arithmetic(task_vectors: Tensor, weights: Optional[Sequence[float]] = None, scale: float = 0.4) -> Tensor:
    """Weighted sum times `scale` (task arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089).

    Weights are relative here too: they are brought to a mean of 1, so that equal ones of any size give the plain sum.
    Arguments, result and errors as in `ties`.
    """
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    return scale * (weighted_sum(vectors, relative) * (len(vectors) / sum(relative)))


def dare(
    task_vectors: Tensor,
    weights: Optional[Sequence[float]] = None,
    density: float = 0.5,
    scale: float = 0.4,
    seed: int = 0,
) -> Tensor:
    """Drop entries at random, rescale the rest by 1 / density, and sum as `task_arithmetic` does (DARE, Yu et al. 2023,
    https://arxiv.org/abs/2311.03099).

    What is dropped depends on the seed and on each task vector's own values: neither on the order of the experts nor
    on what ran before. Other arguments, result and errors as in `ties`.

    density (float): The chance of an entry to be kept, above 0 and up to 1.
    seed (int): Of the choice.
    """
    check_density(density)
    vectors, relative = prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    dropped = torch.stack([drop(vector, density, seed) for vector in vectors])
    return scale * (weighted_sum(dropped, relative) * (len(vectors) / sum(relative)))


def trim(task_vectors: Tensor, density: float) -> Tensor:
    """Keep the `int(density * numel)` entries of largest magnitude of each task vector, and set the others to 0.

    Of entries with equal magnitude at the border, those that come first in the tensor (row by row) are kept.

    task_vectors (Tensor): `[n_experts, ...]`.
    density (float): Above 0 and up to 1.
    RETURNS (Tensor): `[n_experts, ...]`.
    RAISES: SamError S401 for a bad density or an empty stack.
    """
    check_density(density)
    vectors = as_stack(task_vectors)
    n_keep = int(density * vectors[0].numel())
    return torch.stack([torch.where(largest(vector, n_keep), vector, 0) for vector in vectors])


def elect_signs(trimmed: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
    """The sign with the larger total for every entry: of the weighted sum over the experts, +1 where that is 0.

    trimmed (Tensor): `[n_experts, ...]`, task vectors after `trim`.
    weights (Optional[Sequence[float]]): One for each expert, relative; None for equal ones.
    RETURNS (Tensor): `[...]` of +1 and -1.
    RAISES: SamError S401 for bad weights or an empty stack.
    """
    vectors = as_stack(trimmed)
    total = weighted_sum(vectors, relative_weights(weights, len(vectors), vectors.dtype))
    return torch.where(total >= 0, torch.ones_like(total), -torch.ones_like(total))


def disjoint_mean(trimmed: Tensor, signs: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
    """Weighted mean over the experts whose entry has the elected sign; 0 where none has.

    trimmed (Tensor): `[n_experts, ...]`, task vectors after `trim`.
    signs (Tensor): `[...]` of +1 and -1, from `elect_signs`.
    weights (Optional[Sequence[float]]): One for each expert, relative; None for equal ones.
    RETURNS (Tensor): `[...]`.
    RAISES: SamError S401 for bad weights or an empty stack.
    """
    vectors = as_stack(trimmed)
    total, agreeing = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, relative_weights(weights, len(vectors), vectors.dtype)):
        agrees = vector.sign() == signs
        total += torch.where(agrees, weight * vector, 0)
        agreeing += weight * agrees.to(vectors.dtype)
    return total / torch.where(agreeing > 0, agreeing, 1)
