"""Merge methods on LoRA factors, in the subspace that the experts' changes span together.

The merged change is an exact low-rank adapter, of rank at most the sum of the experts' ranks: nothing is cut off, and
nothing of the size of the weight is computed. Cost is that of QR and SVD of `[out, R]` and `[in, R]`, R the sum of ranks.
These are methods of their own, and none of them is TIES on dense task vectors.

Everywhere: factors are one matrix's, one pair for each expert, of any ranks; rank 0 is an expert that does not change it.
Weights are relative, as in `methods`. A single expert comes back as it is.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor

from ..adapters import LoraFactors
from ..errors import SamError
from .factors import (
    ROUNDING,
    Low,
    Svd,
    from_svd,
    left_basis,
    low_rank_svd,
    orthogonalise,
    prepare_factors,
    to_factors,
)
from .methods import MergeMethod, Ties, ties
from .stacks import check_density, check_scale, is_number, mean_one

# Bases of the experts' own factors keep every direction that float64 can tell from 0.
FACTOR_ROUNDING = 1e-10


@dataclass(frozen=True)
class Star:
    """STAR; see `star`. RAISES: SamError S401 for a bad eta or scale."""

    eta: float = 40.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.STAR.v1", "eta": self.eta, "scale": self.scale}

    def merge_factors(self, factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None) -> LoraFactors:
        return star(factors, weights, self.eta, self.scale)


@dataclass(frozen=True)
class IsoC:
    """Iso-C; see `iso_c`. RAISES: SamError S401 for a bad scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.IsoC.v1", "scale": self.scale}

    def merge_factors(self, factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None) -> LoraFactors:
        return iso_c(factors, weights, self.scale)


@dataclass(frozen=True)
class Tsvm:
    """TSV-M; see `tsv_m`. RAISES: SamError S401 for a bad scale."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.TSVM.v1", "scale": self.scale}

    def merge_factors(self, factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None) -> LoraFactors:
        return tsv_m(factors, weights, self.scale)


@dataclass(frozen=True)
class Knots:
    """KnOTS-TIES; see `knots`. RAISES: SamError S401 for a bad density or scale."""

    density: float = 1.0
    scale: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)
        check_scale(self.scale)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.KnOTS.v1", "density": self.density, "scale": self.scale}

    def merge_factors(self, factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None) -> LoraFactors:
        return knots(factors, weights, self.density, self.scale)


@dataclass(frozen=True)
class CoreSpace:
    """Merging in core space; see `core_space`. RAISES: SamError S401 if `inner` is no method of dense task vectors."""

    inner: MergeMethod = field(default_factory=Ties)

    def __post_init__(self) -> None:
        _check_inner(self.inner)

    @property
    def config(self) -> Dict[str, Any]:
        return {"@misc": "spacy_sam.CoreSpace.v1", "inner": self.inner.config}

    def merge_factors(self, factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None) -> LoraFactors:
        return core_space(factors, weights, self.inner)


def star(
    factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None, eta: float = 40.0, scale: float = 1.0
) -> LoraFactors:
    """Cut each task vector down to its largest singular values, restore its nuclear norm, and average (STAR, Lee et al. 2025,
    https://arxiv.org/abs/2502.10339).

    factors (Sequence[LoraFactors]): One matrix's, one pair for each expert; rank 0 where one does not change it.
    weights (Optional[Sequence[float]]): One for each expert, relative, above 0; None for equal ones.
    eta (float): Percent of the nuclear norm that the kept singular values reach, above 0 and up to 100.
    scale (float): Multiplies the result, above 0.
    RETURNS (LoraFactors): Scale 1, rank at most the sum of the ranks, in the layout of the first.
    RAISES: SamError S401 for bad weights, eta, scale or factors, S407 for NaN and infinite values.
    """
    _check_eta(eta)
    lows, relative = prepare_factors(factors, weights, scale)
    if len(lows) == 1:
        return factors[0]
    parts = [truncate_and_rescale(low_rank_svd(low), eta) for low in lows]
    shares = [scale * weight / sum(relative) for weight in relative]
    return from_svd(*_side_by_side(parts, shares), factors[0])


def truncate_and_rescale(svd: Svd, eta: float) -> Svd:
    """STAR's change of one task vector: the fewest singular values that reach `eta` percent of their sum, times what makes
    the sum the same again."""
    total = svd.s.sum()
    # The little less is for sums that reach the share exactly, but for rounding.
    rank = int((svd.s.cumsum(0) < total * (eta / 100) * (1 - 1e-9)).sum()) + 1
    kept = svd.s[:rank]
    return Svd(svd.u[:, :rank], kept * (total / kept.sum()), svd.v[:rank])


def iso_c(factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None, scale: float = 1.0) -> LoraFactors:
    """Give all singular values of the sum their mean (Iso-C, Marczak et al. 2025, https://arxiv.org/abs/2502.04959).

    The mean is over the directions that the sum has. Over all min(out, in), as in the authors' code, a sum of LoRA changes
    would shrink to nearly nothing, and directions that are only rounding would get the same weight as the others. The sum
    is weighted as in `methods.task_arithmetic`. Other arguments, result and errors as in `star`.
    """
    lows, relative = prepare_factors(factors, weights, scale)
    if len(lows) == 1:
        return factors[0]
    b = torch.cat([weight * low.b for low, weight in zip(lows, mean_one(relative))], dim=1)
    u, s, v = low_rank_svd(Low(b, torch.cat([low.a for low in lows])))
    return from_svd(u, torch.full_like(s, scale * s.sum().item() / max(len(s), 1)), v, factors[0])


def tsv_m(factors: Sequence[LoraFactors], weights: Optional[Sequence[float]] = None, scale: float = 1.0) -> LoraFactors:
    """Put the experts' singular vectors side by side, make them orthonormal, and recombine (TSV-M, Gargiulo et al. 2024,
    https://arxiv.org/abs/2412.00081).

    Each expert has an equal share of the directions: those of the subspace that all span, divided by the experts that
    change this matrix. With equal ranks and independent experts that is all of an expert's own, so nothing is cut. Weights
    multiply the singular values, at a mean of 1. Other arguments, result and errors as in `star`.
    """
    lows, relative = prepare_factors(factors, weights, scale)
    if len(lows) == 1:
        return factors[0]
    parts = [low_rank_svd(low) for low in lows]
    n_columns = left_basis(torch.cat([part.u * part.s for part in parts], dim=1)).shape[1]
    n_rows = left_basis(torch.cat([part.v.T * part.s for part in parts], dim=1)).shape[1]
    n_present = max(sum(len(part.s) > 0 for part in parts), 1)
    n_kept = max(min(n_columns, n_rows) // n_present, 1)
    parts = [Svd(part.u[:, :n_kept], part.s[:n_kept], part.v[:n_kept]) for part in parts]
    u, s, v = _side_by_side(parts, [scale * weight for weight in mean_one(relative)])
    return from_svd(orthogonalise(u), s, orthogonalise(v.T).T, factors[0])


def knots(
    factors: Sequence[LoraFactors],
    weights: Optional[Sequence[float]] = None,
    density: float = 1.0,
    scale: float = 0.5,
) -> LoraFactors:
    """TIES on the experts' coordinates in a shared basis (KnOTS-TIES, Stoica et al. 2024, https://arxiv.org/abs/2410.19735).

    The basis U is the left singular vectors of [dW_1 ... dW_n], an expert's coordinates are U' dW_i, `[rank, in]`. The
    density counts within this matrix. The authors' code takes the top share over all layers in one, and keeps an entry more
    than that; at density 1, as in their settings for language models, both are the same. Other arguments, result and errors
    as in `star`.

    density (float): The share of each expert's coordinates that TIES keeps, above 0 and up to 1.
    """
    check_density(density)
    lows, relative = prepare_factors(factors, weights, scale)
    if len(lows) == 1:
        return factors[0]
    parts = [low_rank_svd(low) for low in lows]
    basis = left_basis(torch.cat([part.u * part.s for part in parts], dim=1))
    coordinates = torch.stack([(basis.T @ part.u * part.s) @ part.v for part in parts])
    return to_factors(basis, ties(_without_rounding(coordinates), relative, density, scale), factors[0])


def core_space(
    factors: Sequence[LoraFactors],
    weights: Optional[Sequence[float]] = None,
    inner: Optional[MergeMethod] = None,
) -> LoraFactors:
    """Merge the experts' core matrices by any dense method (core space, Panariello et al. 2025,
    https://arxiv.org/abs/2509.17786).

    With U the left singular vectors of [B_1 ... B_n] and V those of [A_1' ... A_n'], an expert is M_i = U' B_i A_i V, at most
    `[R, R]` for R the sum of ranks, and nothing is lost. The M_i are merged, and the result is U M V'. A linear method
    gives what it gives on the dense task vectors, another one does not. What TIES gives depends on how an expert's change
    is divided between B and A, as in the paper; LoRA's scale counts with B. Other arguments, result and errors as in `star`.

    inner (Optional[MergeMethod]): The method, with its scale; None for TIES with its defaults.
    """
    method = inner if inner is not None else Ties()
    _check_inner(method)
    lows, relative = prepare_factors(factors, weights, 1.0)
    if len(lows) == 1:
        return factors[0]
    left = left_basis(torch.cat([low.b for low in lows], dim=1), FACTOR_ROUNDING)
    right = left_basis(torch.cat([low.a.T for low in lows], dim=1), FACTOR_ROUNDING)
    cores = torch.stack([(left.T @ low.b) @ (low.a @ right) for low in lows])
    merged = method(_without_rounding(cores), relative)
    if left.shape[1] <= right.shape[1]:
        return to_factors(left, merged @ right.T, factors[0])
    return to_factors(left @ merged, right.T, factors[0])


def _without_rounding(coordinates: Tensor) -> Tensor:
    """What is 0 but for rounding is 0: an expert without a part in a direction has no say and no count in an election there."""
    largest = coordinates.abs().max() if coordinates.numel() else 0
    return torch.where(coordinates.abs() > ROUNDING * largest, coordinates, 0)


def _side_by_side(parts: List[Svd], shares: Sequence[float]) -> Svd:
    u = torch.cat([part.u for part in parts], dim=1)
    s = torch.cat([share * part.s for part, share in zip(parts, shares)])
    return Svd(u, s, torch.cat([part.v for part in parts]))


def _check_eta(eta: float) -> None:
    if not (is_number(eta) and 0 < eta <= 100):
        raise SamError("S401", name="eta", expected="above 0 and at most 100", found=repr(eta))


def _check_inner(inner: Any) -> None:
    if not isinstance(inner, MergeMethod):
        raise SamError("S401", name="inner", expected="a merge method of dense task vectors", found=repr(inner))
    if isinstance(inner, Ties) and inner.trim == "global":  # a core matrix is no part of a whole task vector
        raise SamError("S401", name="inner", expected="TIES that trims each matrix by itself", found=repr(inner))
