"""Compression of experts: fewer bits for each number of the factors, most of them where they count, as a bank of its own.

dW = scale * B @ A of each matrix is taken apart into its singular vectors, each of which is rounded to the 2 ** width levels that
are best for normally distributed numbers (Lloyd 1982, Max 1960). The widths differ: bits go where they take away most of the
squared error of dW over the whole expert, and directions that are not worth a bit are left out. One factor for each direction is
then fitted by least squares.
"""

import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter, LoraFactors
from .bank import BANK_FILE, ExpertBank
from .compressed import MAX_WIDTH, Compressed, Head, Matrix, is_compressed, pack, write_compressed
from .errors import SamError

LEAST_BITS, MOST_BITS = 0.5, 8.0
OVERHEAD = 40  # bits that a direction takes beside its two vectors: its factor and its width
FILE_BYTES, MATRIX_BYTES = 1600, 120  # of the heads of both files, and of a matrix in them: about what they take


def compress_bank(
    bank: ExpertBank,
    out: Path,
    bits: float = 2,
    *,
    share_base: bool = False,
    report: Callable[[str, Compressed], None] = lambda name, compressed: None,
) -> ExpertBank:
    """Write a bank with the same experts in less space. The bank that is compressed stays as it is.

    Dev scores are not taken over: they are those of the originals.

    bank (ExpertBank): The bank.
    out (Path): The new bank's folder, which must not be there, or be empty.
    bits (float): Bits for each number of the factors on average, .5 to 8; they are 32 in float32 and 16 in bfloat16.
    share_base (bool): Refer to the base in the other bank's folder by a relative path, and do not copy it.
    report (Callable[[str, Compressed], None]): Told of each expert.
    RETURNS (ExpertBank): The new bank.
    RAISES: SamError S205 for `bits`, S117 or S121 if there is something at `out`, S120 if an expert is compressed already, and
        what reading experts raises. Nothing is left at `out` then.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not LEAST_BITS <= bits <= MOST_BITS:
        raise SamError(
            "S205", setting="bits", expected=f"a number from {LEAST_BITS} to {MOST_BITS:g}", found=repr(bits)
        )
    if (out / BANK_FILE).exists():
        raise SamError("S117", path=out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SamError("S121", path=out)
    cards = [*bank.experts, *bank.baselines]
    for card in cards:
        if is_compressed(bank.folder(card.name)):
            raise SamError("S120", name=card.name, problem="rounding it once more would lose more than it must")
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".compressing-", dir=out.parent))  # beside `out`: relative paths are the same
    try:
        new = _empty_copy(bank, staged, share_base)
        for card in cards:
            compressed = compress(bank.load_adapter(card.name), bits, bank.adapter_hash(card.name))
            folder = new.path / f".{card.name}"
            folder.mkdir()
            write_compressed(compressed, folder)
            kept = {"bits": compressed.head.bits, "error": compressed.head.error}
            new.add(card.name, folder, replace(card, scores={}, training={**card.training, "compressed": kept}))
            shutil.rmtree(folder)
            report(card.name, compressed)
        if out.exists():
            out.rmdir()
        os.replace(new.path, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return ExpertBank(out)


def _empty_copy(bank: ExpertBank, path: Path, share_base: bool) -> ExpertBank:
    """A bank around the same base, with the same settings and no experts."""
    source, revision = bank.base
    base = source
    if Path(source).is_dir() and Path(source).resolve().is_relative_to(bank.path.resolve()):
        base = os.path.relpath(source, path) if share_base else Path(source).name
        if not share_base:
            shutil.copytree(source, path / base)
    new = ExpertBank.create(
        path,
        base=base,
        revision=revision,
        prompt=bank.prompt,
        encoder=bank.encoder,
        name=bank.name,
        details=bank.details,
    )
    if new.base_hash != bank.base_hash:
        raise SamError("S110", path=bank.path, found=new.base_hash, expected=bank.base_hash)
    new.entity_bias = bank.entity_bias
    return new


class _Directions(NamedTuple):
    """A matrix's weight change as `(u * s) @ v.T`: u [n_out, rank], s [rank] descending, v [n_in, rank]."""

    u: Tensor
    s: Tensor
    v: Tensor


class _Part(NamedTuple):
    """What is kept of a matrix: of each direction its width, its scale and its codes as bytes; and the squared error."""

    widths: List[int]
    scales: List[float]
    codes: List[np.ndarray]
    lost: float


def compress(adapter: Adapter, bits: float, source_hash: str = "") -> Compressed:
    """Compress an adapter.

    adapter (Adapter): Its factors.
    bits (float): Bits for each number of the factors, on average and with all that the files hold beside them; above 0.
    source_hash (str): The adapter's content hash, to be kept.
    RETURNS (Compressed): The compressed expert; an adapter that changes nothing becomes one without directions.
    """
    exact = {key: _take_apart(factors) for key, factors in adapter.matrices.items()}
    parts = [_round_matrix(each, widths) for each, widths in zip(exact.values(), _widths(list(exact.values()), bits))]
    matrices = tuple(
        Matrix(key, len(exact[key].u), len(exact[key].v), len(part.widths), adapter.matrices[key].transposed)
        for key, part in zip(exact, parts)
    )
    widths = [width for part in parts for width in part.widths]
    codes = [each for part in parts for each in part.codes]
    data = {
        "codes": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *codes])),
        "widths": torch.tensor(widths, dtype=torch.uint8),
        "scales": torch.tensor([scale for part in parts for scale in part.scales], dtype=torch.float32),
        "levels": torch.cat([torch.zeros(0), *(levels(width) for width in range(1, max(widths, default=0) + 1))]),
    }
    lost, total = sum(part.lost for part in parts), sum(float(each.s.square().sum()) for each in exact.values())
    error = math.sqrt(max(lost, 0.0) / total) if total else 0.0
    return Compressed(Head(matrices, float(bits), round(error, 6), source_hash), data)


def _take_apart(factors: LoraFactors) -> _Directions:
    """Singular vectors of scale * B @ A, without making it dense."""
    left, of_b = torch.linalg.qr(factors.b.double())
    right, of_a = torch.linalg.qr(factors.a.double().T)
    u, s, v = torch.linalg.svd(factors.scale * of_b @ of_a.T, full_matrices=False)
    return _Directions((left @ u).float(), s.float(), (right @ v.T).float())


def _widths(found: List[_Directions], bits: float) -> List[List[int]]:
    """Bits of each direction of each matrix: the steps that take away most squared error for their bits, until none is left."""
    asked = sum(bits * (len(d.u) + len(d.v)) * len(d.s) for d in found)
    besides = 8 * (FILE_BYTES + MATRIX_BYTES * len(found))
    budget = max(asked - besides, asked / 2)  # of small adapters, the names weigh more than the numbers
    errors = [1.0, *(1 - (1 - _distortion(width)) ** 2 for width in range(1, MAX_WIDTH + 1))]
    steps: List[Tuple[float, int, int, int, int]] = []
    for number, (u, s, v) in enumerate(found):
        for place, value in enumerate(s.tolist()):
            gain = math.inf
            for width in range(1, MAX_WIDTH + 1):
                cost = len(u) + len(v) + (OVERHEAD if width == 1 else 0)
                # Never more than the step before, which must be taken first: its cost has the overhead in it.
                gain = min(gain, value**2 * (errors[width - 1] - errors[width]) / cost)
                if gain > 0:
                    steps.append((-gain, number, place, width, cost))
    widths = [[0] * len(d.s) for d in found]
    for _, number, place, width, cost in sorted(steps):
        if cost <= budget and widths[number][place] == width - 1:  # a step that did not fit ends its direction
            budget -= cost
            widths[number][place] = width
    return widths


def levels(width: int) -> Tensor:
    """The 2 ** width levels with the least mean squared error for normally distributed numbers, ascending, float32."""
    return _lloyd(width)[0]


def _distortion(width: int) -> float:
    """What rounding to `levels` leaves of a normally distributed number's variance, as a share of it."""
    return _lloyd(width)[1]


_TABLES: Dict[int, Tuple[Tensor, float]] = {}


def _lloyd(width: int) -> Tuple[Tensor, float]:
    """Lloyd's iteration on the normal distribution: every level is the mean of the numbers that are nearest to it."""
    if width not in _TABLES:
        normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        n_levels = 2**width
        found = math.sqrt(3) * normal.icdf((torch.arange(n_levels, dtype=torch.float64) + 0.5) / n_levels)
        share = found
        for _ in range(200):
            far = torch.tensor([math.inf], dtype=torch.float64)
            edges = torch.cat([-far, (found[1:] + found[:-1]) / 2, far])
            share = normal.cdf(edges).diff()
            found = -normal.log_prob(edges).exp().diff() / share
        _TABLES[width] = (found.float(), float(1 - (found.square() * share).sum()))
    return _TABLES[width]


def _round(vector: Tensor, width: int) -> Tensor:
    """Codes of the nearest levels, after the vector is brought to a mean square of 1: [n], int64."""
    table = levels(width)
    size = vector.norm() / math.sqrt(len(vector))
    return torch.bucketize(vector / size, (table[1:] + table[:-1]) / 2)


def _round_matrix(exact: _Directions, widths: List[int]) -> _Part:
    """Round the directions that have bits, and fit a scale to each."""
    kept = [(exact.u[:, place], exact.v[:, place], width) for place, width in enumerate(widths) if width]
    codes = [(_round(u, width), _round(v, width)) for u, v, width in kept]
    u, v = exact.u.new_zeros((len(exact.u), len(kept))), exact.v.new_zeros((len(exact.v), len(kept)))
    for place, ((of_u, of_v), (_, _, width)) in enumerate(zip(codes, kept)):
        u[:, place], v[:, place] = levels(width)[of_u], levels(width)[of_v]
    scales, lost = _fit(exact, u, v)
    packed = [pack(torch.cat(pair), width) for pair, (_, _, width) in zip(codes, kept)]
    return _Part([width for _, _, width in kept], scales, packed, lost)


def _fit(exact: _Directions, u: Tensor, v: Tensor) -> Tuple[List[float], float]:
    """Least squares of dW by rounded directions.

    exact (_Directions): dW.
    u (Tensor): Rounded, [n_out, n_kept]. v (Tensor): Rounded, [n_in, n_kept].
    RETURNS (Tuple[List[float], float]): A factor for each kept direction, and the squared error that is left.
    """
    u, v = u.double(), v.double()
    products = (u.T @ u) * (v.T @ v)
    wanted = ((u.T @ exact.u.double() * exact.s.double()) * (v.T @ exact.v.double())).sum(1)
    factors = torch.linalg.pinv(products, hermitian=True) @ wanted  # short vectors may be rounded to equal ones
    return factors.float().tolist(), float(exact.s.double().square().sum() - factors @ wanted)
