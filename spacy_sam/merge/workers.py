"""Threads for tiles: each takes the next one, and runs torch's operations alone.

Torch's own threads meet after every operation. On tiles that fit a core's cache an operation takes a tenth of a
millisecond, so they would wait more than work, and where other processes want the cores, too, they wait long.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch

from ..adapters import LoraFactors, tiles

T = TypeVar("T")
LEAST_MEMORY = 1 << 23  # float32 numbers


class Product:
    """dW of tiles of one matrix, from its factors."""

    def __init__(self, factors: LoraFactors) -> None:
        self.left, self.right = factors.operands()
        self.shape = factors.shape
        self.size = self.shape[0] * self.shape[1]
        self.tiles = tiles(self.shape, self.left.device)
        self.tile_size = self.tiles[0].stop * self.shape[1] if self.tiles else 0  # of the first, which is the largest

    def rows(self, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
        """dW of a tile, in the buffer: bit for bit that of `LoraFactors.delta`."""
        return torch.mm(self.left[rows], self.right, out=buffer[: rows.stop - rows.start])


class TileWorkers:
    """A context in which tiles are worked on: by as many threads as torch has on a CPU, by the caller's own elsewhere."""

    def __init__(self) -> None:
        self.n_threads = torch.get_num_threads()
        self._pool: Optional[ThreadPoolExecutor] = None
        self._own = threading.local()  # each thread's buffers, and `is_worker` in those of the pool

    def __enter__(self) -> "TileWorkers":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def map(self, product: Product, make: Callable[[], Callable[[slice], T]], n_buffers: int) -> List[T]:
        """Work on every tile of a matrix.

        product (Product): Of the matrix, or of another one of its shape and device.
        make (Callable): Called once in each thread, for a function of a tile's rows.
        n_buffers (int): How many tiles it needs room for: threads that would need more than a fifth of the matrix rest.
        RETURNS (List[T]): What the function returned, in the order of the tiles.
        """
        todo = product.tiles
        numbered = iter(enumerate(todo))  # shared: each thread takes the next
        if product.left.device.type != "cpu" or self.n_threads == 1 or hasattr(self._own, "is_worker"):
            return [result for _, result in _work(numbered, make)]
        memory = max(product.size // 5, LEAST_MEMORY)
        in_use = n_buffers * max(1, product.tile_size)
        n_threads = min(self.n_threads, max(1, len(todo)), max(1, memory // in_use))
        parts = list(self._threads().map(lambda _: _work(numbered, make), range(n_threads)))
        done = dict(pair for part in parts for pair in part)
        return [done[number] for number in range(len(todo))]

    def buffer(self, number: int, product: Product) -> torch.Tensor:
        """Room for any tile of a matrix: the calling thread's own, and the same at the next call with the same number.

        Memory that is asked for anew is slow at first use: more so than a small matrix's merge.
        """
        buffers = self._own.__dict__.setdefault("buffers", {})
        key = (number, product.left.device)
        if key not in buffers or len(buffers[key]) < product.tile_size:
            buffers[key] = product.left.new_empty(product.tile_size)
        return buffers[key][: product.tile_size].view(-1, product.shape[1])

    def each(self, jobs: Sequence[Callable[[], T]]) -> List[T]:
        """Do several small jobs, each in one thread; a single one is done here, and its tiles in the threads."""
        if len(jobs) == 1:
            return [jobs[0]()]
        return list(self._threads().map(_do, jobs))

    def _begin(self) -> None:
        torch.set_num_threads(1)
        self._own.is_worker = True

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.n_threads, initializer=self._begin)
            all_are_there = threading.Barrier(self.n_threads)
            list(self._pool.map(lambda _: all_are_there.wait(), range(self.n_threads)))
            torch.set_num_threads(self.n_threads)  # the last call decides for threads that torch does not know yet
        return self._pool


@torch.no_grad()  # of this thread
def _do(job: Callable[[], T]) -> T:
    return job()


@torch.no_grad()
def _work(numbered: Iterator[Tuple[int, slice]], make: Callable[[], Callable[[slice], T]]) -> List[Tuple[int, T]]:
    work = make()
    return [(number, work(rows)) for number, rows in numbered]
