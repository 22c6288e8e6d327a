"""Merge methods: pure functions on stacked task vectors, and the same as frozen settings for configs.

Everywhere: `task_vectors` is `[n_experts, ...]`, one matrix's weight change by each expert. The mathematics is done,
and the result returned, in float32 (float64 if that comes in), `[...]`. Weights are relative: finite, above 0, and only
their proportions matter. The size of the result is set by `scale`. Trimming and scale are there against the
interference of several experts: a stack of one comes back as it is, whatever the settings.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple, runtime_checkable

import torch
from torch import Tensor

from ..errors import SamError

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
        _check_density(self.density)
        _check_scale(self.scale)
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
        _check_scale(self.scale)

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
        _check_scale(self.scale)

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
        _check_density(self.density)
        _check_scale(self.scale)

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
    RAISES: SamError S401 for bad weights, density, scale or an empty stack.
    """
    _check_density(density)
    vectors, relative = _prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    trimmed = trim(vectors, density)
    return scale * disjoint_mean(trimmed, elect_signs(trimmed, relative), relative)


def mean(task_vectors: Tensor, weights: Optional[Sequence[float]] = None, scale: float = 1.0) -> Tensor:
    """Weighted mean times `scale`. Arguments, result and errors as in `ties`."""
    vectors, relative = _prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    return scale * (_weighted_sum(vectors, relative) / sum(relative))


def task_arithmetic(task_vectors: Tensor, weights: Optional[Sequence[float]] = None, scale: float = 0.4) -> Tensor:
    """Weighted sum times `scale` (task arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089).

    Weights are relative here too: they are brought to a mean of 1, so that equal ones of any size give the plain sum.
    Arguments, result and errors as in `ties`.
    """
    vectors, relative = _prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    return scale * (_weighted_sum(vectors, relative) * (len(vectors) / sum(relative)))


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
    _check_density(density)
    vectors, relative = _prepare(task_vectors, weights, scale)
    if len(vectors) == 1:
        return vectors[0].clone()
    dropped = torch.stack([_drop(vector, density, seed) for vector in vectors])
    return scale * (_weighted_sum(dropped, relative) * (len(vectors) / sum(relative)))


def _drop(vector: Tensor, density: float, seed: int) -> Tensor:
    content = zlib.crc32(vector.cpu().contiguous().view(torch.uint8).numpy().tobytes(), zlib.crc32(str(seed).encode()))
    generator = torch.Generator().manual_seed(content)
    kept = torch.rand(vector.shape, generator=generator) < density
    return torch.where(kept.to(vector.device), vector / density, 0)


def trim(task_vectors: Tensor, density: float) -> Tensor:
    """Keep the `int(density * numel)` entries of largest magnitude of each task vector, and set the others to 0.

    Of entries with equal magnitude at the border, those that come first in the tensor (row by row) are kept.

    task_vectors (Tensor): `[n_experts, ...]`.
    density (float): Above 0 and up to 1.
    RETURNS (Tensor): `[n_experts, ...]`.
    RAISES: SamError S401 for a bad density or an empty stack.
    """
    _check_density(density)
    vectors = _as_stack(task_vectors)
    n_keep = int(density * vectors[0].numel())
    return torch.stack([torch.where(_largest(vector, n_keep), vector, 0) for vector in vectors])


def elect_signs(trimmed: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
    """The sign with the larger total for every entry: of the weighted sum over the experts, +1 where that is 0.

    trimmed (Tensor): `[n_experts, ...]`, task vectors after `trim`.
    weights (Optional[Sequence[float]]): One for each expert, relative; None for equal ones.
    RETURNS (Tensor): `[...]` of +1 and -1.
    RAISES: SamError S401 for bad weights or an empty stack.
    """
    vectors = _as_stack(trimmed)
    total = _weighted_sum(vectors, _relative_weights(weights, vectors))
    return torch.where(total >= 0, torch.ones_like(total), -torch.ones_like(total))


def disjoint_mean(trimmed: Tensor, signs: Tensor, weights: Optional[Sequence[float]] = None) -> Tensor:
    """Weighted mean over the experts whose entry has the elected sign; 0 where none has.

    trimmed (Tensor): `[n_experts, ...]`, task vectors after `trim`.
    signs (Tensor): `[...]` of +1 and -1, from `elect_signs`.
    weights (Optional[Sequence[float]]): One for each expert, relative; None for equal ones.
    RETURNS (Tensor): `[...]`.
    RAISES: SamError S401 for bad weights or an empty stack.
    """
    vectors = _as_stack(trimmed)
    total, agreeing = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, _relative_weights(weights, vectors)):
        agrees = vector.sign() == signs
        total += torch.where(agrees, weight * vector, 0)
        agreeing += weight * agrees.to(vectors.dtype)
    return total / torch.where(agreeing > 0, agreeing, 1)


def _largest(vector: Tensor, n_keep: int) -> Tensor:
    """Mask of the `n_keep` entries of largest magnitude, the first ones where magnitudes are equal."""
    if n_keep in (0, vector.numel()):
        return torch.full_like(vector, n_keep > 0, dtype=torch.bool)
    magnitude = vector.abs().reshape(-1)
    border = magnitude.kthvalue(magnitude.numel() - n_keep + 1).values
    mask = magnitude > border
    n_missing = n_keep - int(mask.sum())
    mask[(magnitude == border).nonzero()[:n_missing, 0]] = True
    return mask.reshape(vector.shape)


def _weighted_sum(vectors: Tensor, weights: Sequence[float]) -> Tensor:
    """Expert by expert: a second stack of an 8B model's matrices would be large."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights):
        total += weight * vector
    return total


def _prepare(task_vectors: Tensor, weights: Optional[Sequence[float]], scale: float) -> Tuple[Tensor, List[float]]:
    _check_scale(scale)
    vectors = _as_stack(task_vectors)
    return vectors, _relative_weights(weights, vectors)


def _as_stack(task_vectors: Tensor) -> Tensor:
    if task_vectors.dim() == 0 or len(task_vectors) == 0:
        raise SamError("S401", name="task_vectors", expected="a stack of at least one", found=list(task_vectors.shape))
    return task_vectors if task_vectors.dtype == torch.float64 else task_vectors.float()


def _relative_weights(weights: Optional[Sequence[float]], vectors: Tensor) -> List[float]:
    return relative_weights(weights, len(vectors), vectors.dtype)


def relative_weights(
    weights: Optional[Sequence[float]], n_experts: int, dtype: torch.dtype = torch.float32
) -> List[float]:
    """Divide by a power of two, so that the largest is in [0.5, 1): exact, and no size of weights overflows float32.

    RAISES: SamError S401 unless there are `n_experts` finite weights above 0.
    """
    given = [1.0] * n_experts if weights is None else [float(weight) for weight in weights]
    if len(given) != n_experts or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise SamError("S401", name="weights", expected=f"{n_experts} finite numbers above 0", found=given)
    exponent = math.frexp(max(given))[1]
    # A weight that the dtype would round to 0 would make 0 / 0 of the entries that its expert alone decides.
    smallest = torch.finfo(dtype).eps ** 2
    return [max(math.ldexp(weight, -exponent), smallest) for weight in given]


def _check_density(density: float) -> None:
    if not (_is_number(density) and 0 < density <= 1):
        raise SamError("S401", name="density", expected="above 0 and at most 1", found=repr(density))


def _check_scale(scale: float) -> None:
    if not (_is_number(scale) and math.isfinite(scale) and scale > 0):
        raise SamError("S401", name="scale", expected="a finite number above 0", found=repr(scale))


def _is_number(value: Any) -> bool:
    """confection passes strings for numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
