"""What merge methods share: checks of task vectors, weights and settings, and sums and choices over a stack."""

import math
import zlib
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..errors import SamError


def prepare(task_vectors: Tensor, weights: Optional[Sequence[float]], scale: float) -> Tuple[Tensor, List[float]]:
    """The stack in float32 or float64 and its relative weights.

    RAISES: SamError S401 for a bad scale, bad weights or an empty stack, S407 for NaN and infinite values.
    """
    check_scale(scale)
    vectors = as_stack(task_vectors)
    relative = relative_weights(weights, len(vectors), vectors.dtype)
    for number, vector in enumerate(vectors, 1):
        if not torch.isfinite(vector).all():
            raise SamError("S407", number=number)
    return vectors, relative


def as_stack(task_vectors: Tensor) -> Tensor:
    """RAISES: SamError S401 for a stack of none."""
    if task_vectors.dim() == 0 or len(task_vectors) == 0:
        raise SamError("S401", name="task_vectors", expected="a stack of at least one", found=list(task_vectors.shape))
    return task_vectors if task_vectors.dtype == torch.float64 else task_vectors.float()


def relative_weights(
    weights: Optional[Sequence[float]], n_experts: int, dtype: torch.dtype = torch.float32
) -> List[float]:
    """Divide by a power of two, so that the largest is in [0.5, 1): exact, and no size of weights overflows float32.

    RAISES: SamError S401 unless there is one for each expert, finite and above 0.
    """
    given = [1.0] * n_experts if weights is None else [float(weight) for weight in weights]
    if len(given) != n_experts or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise SamError("S401", name="weights", expected=f"{n_experts} finite numbers above 0", found=given)
    exponent = math.frexp(max(given))[1]
    # A weight that the dtype would round to 0 would make 0 / 0 of the entries that its expert alone decides.
    smallest = torch.finfo(dtype).eps ** 2
    return [max(math.ldexp(weight, -exponent), smallest) for weight in given]


def mean_one(weights: Sequence[float]) -> List[float]:
    """Weights brought to a mean of 1, so that equal ones of any size make a plain sum."""
    return [weight * len(weights) / sum(weights) for weight in weights]


def weighted_sum(vectors: Tensor, weights: Sequence[float]) -> Tensor:
    """Expert by expert: a second stack of an 8B model's matrices would be large."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights):
        total += weight * vector
    return total


def largest(vector: Tensor, n_keep: int) -> Tensor:
    """Mask of the `n_keep` entries of largest magnitude, the first ones where magnitudes are equal."""
    if n_keep in (0, vector.numel()):
        return torch.full_like(vector, n_keep > 0, dtype=torch.bool)
    magnitude = vector.abs().reshape(-1)
    border = magnitude.kthvalue(magnitude.numel() - n_keep + 1).values
    mask = magnitude > border
    n_missing = n_keep - int(mask.sum())
    mask[(magnitude == border).nonzero()[:n_missing, 0]] = True
    return mask.reshape(vector.shape)


def drop(vector: Tensor, keep: Union[float, Tensor], seed: int) -> Tensor:
    """Keep each entry by chance and divide it by that chance, so that its expected value stays.

    vector (Tensor): One task vector. What is dropped depends on its values and the seed alone.
    keep (Union[float, Tensor]): The chance of an entry to be kept, above 0: one for all, or one for each.
    """
    content = zlib.crc32(vector.cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), zlib.crc32(str(seed).encode()))
    generator = torch.Generator().manual_seed(content)
    chance = torch.rand(vector.shape, generator=generator).to(vector.device)
    return torch.where(chance < keep, vector / keep, 0)


def check_density(density: float) -> None:
    if not (is_number(density) and 0 < density <= 1):
        raise SamError("S401", name="density", expected="above 0 and at most 1", found=repr(density))


def check_scale(scale: float) -> None:
    if not (is_number(scale) and math.isfinite(scale) and scale > 0):
        raise SamError("S401", name="scale", expected="a finite number above 0", found=repr(scale))


def is_number(value: Any) -> bool:
    """confection passes strings for numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
