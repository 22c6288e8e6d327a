"""Merging on LoRA factors: the interface, and the linear algebra that never forms a dense weight change.

All of it is done in float64: a singular value is told from rounding by its size, and factors are small.
"""

import zlib
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union, runtime_checkable

import torch
from torch import Tensor

from ..adapters import LoraFactors
from ..errors import SamError
from .methods import MergeMethod
from .stacks import check_scale, relative_weights

# Of a sum of float32 factors, a smaller share of the largest singular value is rounding.
ROUNDING = 1e-6


@runtime_checkable
class FactorMethod(Protocol):
    """Merges one matrix's LoRA factors into the factors of the merged change: exact, of at most the sum of their ranks.

    `config` is the block that makes it again. Experts are in the order of the weights. One that does not change the matrix
    is given with factors of rank 0, and is a task vector of zeros.
    """

    @property
    def config(self) -> Dict[str, Any]: ...

    def merge_factors(self, factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors: ...


Method = Union[MergeMethod, FactorMethod]


class Low(NamedTuple):
    """A weight change as b @ a in float64, the scale in b: b `[out, rank]`, a `[rank, in]`."""

    b: Tensor
    a: Tensor


class Svd(NamedTuple):
    """u @ diag(s) @ v without the directions that are rounding: u `[out, rank]`, s `[rank]`, v `[rank, in]`."""

    u: Tensor
    s: Tensor
    v: Tensor


def no_change(other: LoraFactors) -> LoraFactors:
    """Factors of rank 0 for the matrix of `other`: an expert that does not change it."""
    return LoraFactors(other.a[:0], other.b[:, :0], 1.0, other.transposed)


def concatenate(factors: Sequence[LoraFactors], coefficients: Sequence[float]) -> LoraFactors:
    """The weighted sum of task vectors as factors, exact: B side by side with the coefficients in it, A on top of each other."""
    lows = [_low(each, factors[0].transposed) for each in factors]
    b = torch.cat([coefficient * low.b for low, coefficient in zip(lows, coefficients)], dim=1)
    return to_factors(b, torch.cat([low.a for low in lows]), factors[0])


def prepare_factors(
    factors: Sequence[LoraFactors], weights: Optional[Sequence[float]], scale: float
) -> Tuple[List[Low], List[float]]:
    """Checked factors in one layout, and their relative weights.

    Experts are put in an order that depends on weights and values alone, so that the order they are given in changes no bit.

    RAISES: SamError S401 for a bad scale, bad weights, no factors or factors that do not fit together, S407 for NaN and
        infinite values.
    """
    check_scale(scale)
    shapes = {each.shape for each in factors}
    fits = all(each.a.dim() == each.b.dim() == 2 and each.a.shape[0] == each.b.shape[1] for each in factors)
    if len(shapes) != 1 or not fits:
        found = [(list(each.b.shape), list(each.a.shape)) for each in factors]
        raise SamError(
            "S401", name="factors", expected="at least one pair [out, rank], [rank, in] of one matrix", found=found
        )
    relative = relative_weights(weights, len(factors))
    lows = [_low(each, factors[0].transposed) for each in factors]
    for number, low in enumerate(lows, 1):
        if not (torch.isfinite(low.a).all() and torch.isfinite(low.b).all()):
            raise SamError("S407", number=number)
    order = sorted(range(len(lows)), key=lambda i: (relative[i], _content(lows[i])))
    return [lows[i] for i in order], [relative[i] for i in order]


def to_factors(b: Tensor, a: Tensor, like: LoraFactors) -> LoraFactors:
    """float32 factors with scale 1 in the layout of `like`."""
    return LoraFactors(a.float().contiguous(), b.float().contiguous(), 1.0, like.transposed)


def from_svd(u: Tensor, s: Tensor, v: Tensor, like: LoraFactors) -> LoraFactors:
    """u @ diag(s) @ v as factors of equal size."""
    root = s.sqrt()
    return to_factors(u * root, root[:, None] * v, like)


def low_rank_svd(low: Low) -> Svd:
    """The SVD of b @ a, by QR of both factors and the SVD of a matrix of their rank."""
    q_b, r_b = torch.linalg.qr(low.b)
    q_a, r_a = torch.linalg.qr(low.a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = _rank(s)
    return Svd(q_b @ u[:, :rank], s[:rank], v[:rank] @ q_a.T)


def left_basis(matrix: Tensor, rounding: float = ROUNDING) -> Tensor:
    """Left singular vectors of a tall matrix, largest singular value first: `[rows, rank]`.

    The sign that an SVD leaves open is fixed: each vector's largest entry is positive, the first one of equally large ones.
    """
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    basis = q @ u[:, : _rank(s, rounding)]
    if not basis.shape[1]:
        return basis
    magnitude = basis.abs()
    pivots = (magnitude >= magnitude.max(dim=0).values * (1 - 1e-6)).to(torch.uint8).argmax(dim=0)
    return basis * basis.gather(0, pivots[None]).sign()


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (the polar factor), on the span of the columns if they are dependent."""
    q, r = torch.linalg.qr(matrix)
    u, s, v = torch.linalg.svd(r, full_matrices=False)
    rank = _rank(s)
    return q @ (u[:, :rank] @ v[:rank])


def _rank(singular_values: Tensor, rounding: float = ROUNDING) -> int:
    """How many are above rounding; `singular_values` are in descending order, as torch gives them."""
    return int((singular_values > rounding * singular_values[:1]).sum())


def _low(factors: LoraFactors, transposed: bool) -> Low:
    """In the layout asked for: (B A) transposed is A' B'."""
    b, a = factors.scale * factors.b.double(), factors.a.double()
    return Low(b, a) if factors.transposed == transposed else Low(a.T, b.T)


def _content(low: Low) -> int:
    content = 0
    for tensor in low:
        content = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), content)
    return content
