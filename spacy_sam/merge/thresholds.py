"""Which entries of a task vector trimming keeps, found exactly from its factors, without the dense vector.

A sample brackets the border. One pass counts the entries above the bracket and keeps those inside, among which the
border is then selected. If the bracket misses, or holds too many equal magnitudes, histograms of the bits find it.
"""

import math
from threading import Lock
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .workers import Product, TileWorkers

T = TypeVar("T")

LEAST_SAMPLE, MOST_SAMPLE = 1 << 14, 1 << 20
DEVIATIONS = 4  # of the sample's share, on both sides: a miss in some ten thousand, which costs time alone
LEAST_INSIDE = 1 << 16
HALF = 16  # bits
shrink = torch.ops.aten.hardshrink.out  # what is not above a magnitude becomes 0, in one pass


class Cut(NamedTuple):
    """What is kept of one matrix: magnitudes above `value`, and those equal to it at flat positions before `position`."""

    value: float
    position: int

    def trim_(self, tile: Tensor, start: int) -> Tensor:
        """Set what is not kept to 0, in place.

        tile (Tensor): `[rows, columns]`, contiguous float32.
        start (int): The flat position of its first entry in the matrix.
        """
        flat = tile.view(-1)
        split = min(max(self.position - start, 0), len(flat))
        if split:
            shrink(flat[:split], _below(self.value), out=flat[:split])
        if split < len(flat):
            shrink(flat[split:], self.value, out=flat[split:])
        return tile


KEEP_ALL = Cut(0.0, 0)
KEEP_NONE = Cut(math.inf, 0)


class Inside(NamedTuple):
    """What one tile has in a bracket: magnitudes, their flat positions in the matrix, and how many entries are above."""

    values: np.ndarray
    positions: np.ndarray
    n_above: int


def find_cuts(vector: Sequence[Product], n_keep: int, workers: TileWorkers) -> List[Cut]:
    """The entries of largest magnitude of a task vector, the first ones where magnitudes are equal, as `trim` keeps them.

    vector (Sequence[Product]): All matrices of one expert that are trimmed together, in order.
    n_keep (int): How many entries are kept. Entries of 0 that are not in `vector` need not be.
    workers (TileWorkers): Who does it.
    RETURNS (List[Cut]): One for each matrix.
    """
    if n_keep >= sum(product.size for product in vector):
        return [KEEP_ALL] * len(vector)
    if n_keep == 0:
        return [KEEP_NONE] * len(vector)
    found = _by_bracket(vector, n_keep, workers) or _by_histograms(vector, n_keep, workers)
    value, matrix, position = found
    sizes = [product.size for product in vector]
    return [Cut(value, 0 if n > matrix else position if n == matrix else sizes[n]) for n in range(len(vector))]


def _by_bracket(vector: Sequence[Product], n_keep: int, workers: TileWorkers) -> Optional[Tuple[float, int, int]]:
    """Border, and the matrix and position after the last equal entry that is kept; None if it is not in the bracket."""
    low, high = _bracket(vector, n_keep)
    sizes = [product.size for product in vector]
    room = [max(LEAST_INSIDE, max(sizes) // 16, sum(sizes) // 512)]
    inside: List[Inside] = []
    origins: List[int] = []
    for number, product in enumerate(vector):
        found = [tile for tile in workers.map(product, _look_inside(product, low, high, room, workers), 2) if tile]
        inside.extend(found)
        origins.extend([number] * len(found))
        if room[0] < 0:
            return None
    values = np.concatenate([tile.values for tile in inside])
    n_wanted = n_keep - sum(tile.n_above for tile in inside)
    if not 0 < n_wanted <= len(values):
        return None
    place = len(values) - n_wanted
    value = np.partition(values, place)[place]
    n_equal_kept = n_wanted - np.count_nonzero(values > value)
    last = np.flatnonzero(values == value)[n_equal_kept - 1]
    tile, place = _nth([len(tile.values) for tile in inside], int(last) + 1)
    return float(value), origins[tile], int(inside[tile].positions[place - 1]) + 1


def _look_inside(
    product: Product, low: float, high: float, room: List[int], workers: TileWorkers
) -> Callable[[], Callable[[slice], Optional[Inside]]]:
    """Work on tiles: what is in the bracket, `low` included and `high` not; None once that has become too much."""

    def make() -> Callable[[slice], Optional[Inside]]:
        buffer = workers.buffer(0, product)

        def work(rows: slice) -> Optional[Inside]:
            if room[0] < 0:
                return None
            tile = product.rows(rows, buffer)
            found = _split(tile.abs_().view(-1), low, high)
            room[0] -= len(found.values)
            places = found.positions.astype(np.int32 if product.size <= 1 << 31 else np.int64)
            return found._replace(positions=places + rows.start * product.shape[1])

        return work

    return make


def _split(magnitudes: Tensor, low: float, high: float) -> Inside:
    if magnitudes.device.type != "cpu":
        is_above = magnitudes >= high
        found = ((magnitudes >= low) & ~is_above).nonzero()[:, 0]
        return Inside(magnitudes[found].cpu().numpy(), found.cpu().numpy(), int(is_above.sum()))
    values = magnitudes.numpy()  # numpy compares and counts 2 to 5 times as fast here
    mask, above = np.greater_equal(values, np.float32(low)), np.greater_equal(values, np.float32(high))
    n_above = int(np.count_nonzero(above))
    mask ^= above
    places = np.flatnonzero(mask)
    return Inside(values[places], places, n_above)


def _bracket(vector: Sequence[Product], n_keep: int) -> Tuple[float, float]:
    """Magnitudes between which the border is very likely, from a sample."""
    total = sum(product.size for product in vector)
    size = min(max(total // 64, LEAST_SAMPLE), max(MOST_SAMPLE, total // 512))
    sample = np.concatenate([_sample(product, max(1, total // size)) for product in vector])
    share = n_keep / total
    place = len(sample) * (1 - share)
    slack = DEVIATIONS * math.sqrt(len(sample) * share * (1 - share)) + 1
    low, high = math.floor(place - slack), math.ceil(place + slack)
    sample.partition([max(low, 0), min(high, len(sample) - 1)])
    return float(sample[low]) if low >= 0 else 0.0, float(sample[high]) if high < len(sample) else math.inf


def _sample(product: Product, n_groups: int) -> np.ndarray:
    """Magnitudes of one in `n_groups` entries: of random groups of rows, each with a group of columns of its own.

    Each row and column is there, because they differ in size: that is what a sample of some rows would get wrong.
    """
    n_rows, n_columns = product.shape
    n_groups = max(1, min(n_groups, n_rows, n_columns))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(n_rows, generator=generator)[: n_rows // n_groups * n_groups].view(n_groups, -1)
    columns = torch.randperm(n_columns, generator=generator)[: n_columns // n_groups * n_groups].view(n_groups, -1)
    device = product.left.device
    left, right = product.left[rows.to(device)], product.right.T[columns.to(device)]
    return torch.bmm(left, right.transpose(1, 2)).abs_().view(-1).cpu().numpy()


def _by_histograms(vector: Sequence[Product], n_keep: int, workers: TileWorkers) -> Tuple[float, int, int]:
    """The same from counts of the upper and of the lower halves of the bits, which are in the order of the magnitudes."""
    upper, n_wanted = _nth_largest(_counts(vector, workers, None), n_keep)
    lower, n_wanted = _nth_largest(_counts(vector, workers, upper), n_wanted)
    value = float(np.array([(upper << HALF) | lower], dtype=np.int32).view(np.float32)[0])
    if value == 0:  # all others are kept
        return value, 0, 0
    for matrix, product in enumerate(vector):
        n_equal = workers.map(
            product, _each_tile(product, workers, lambda tile: int((tile == value).sum())), n_buffers=2
        )
        if sum(n_equal) >= n_wanted:
            number, n_wanted = _nth(n_equal, n_wanted)
            rows = product.tiles[number]
            equal = product.rows(rows, workers.buffer(0, product)).abs_().view(-1) == value
            return value, matrix, rows.start * product.shape[1] + int(equal.nonzero()[n_wanted - 1, 0]) + 1
        n_wanted -= sum(n_equal)
    raise AssertionError("two passes found different numbers of entries")


def _nth_largest(counts: np.ndarray, n: int) -> Tuple[int, int]:
    """The bin with the n-th largest entry, and which one of the bin's it is."""
    place, left = _nth(counts[::-1], n)
    return len(counts) - 1 - place, left


def _nth(counts: Any, n: int) -> Tuple[int, int]:
    """Where the n-th of things is that are counted in groups, and which one of its group."""
    ends = np.cumsum(counts)
    place = int(np.searchsorted(ends, n))
    return place, n - int(ends[place] - counts[place])


def _counts(vector: Sequence[Product], workers: TileWorkers, upper: Optional[int]) -> np.ndarray:
    """How many magnitudes have each upper half of bits, or each lower half with the given upper half."""
    total = np.zeros(1 << HALF, dtype=np.int64)
    lock = Lock()

    def count(tile: Tensor) -> None:
        bits = tile.view(torch.int32)
        bits = bits >> HALF if upper is None else bits[bits >> HALF == upper] & ((1 << HALF) - 1)
        counts = torch.bincount(bits, minlength=1 << HALF).cpu().numpy()
        with lock:
            np.add(total, counts, out=total)

    for product in vector:
        workers.map(product, _each_tile(product, workers, count), n_buffers=6)
    return total


def _each_tile(
    product: Product, workers: TileWorkers, look: Callable[[Tensor], T]
) -> Callable[[], Callable[[slice], T]]:
    """Work on tiles: look at their magnitudes, flat."""

    def make() -> Callable[[slice], T]:
        buffer = workers.buffer(0, product)
        return lambda rows: look(product.rows(rows, buffer).abs_().view(-1))

    return make


def _below(value: float) -> float:
    """The next smaller magnitude in float32."""
    return float(np.nextafter(np.float32(value), np.float32(0)))
