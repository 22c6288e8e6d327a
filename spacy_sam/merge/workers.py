"""Threads for tiles: each takes the next one, and runs torch's operations alone.

Torch's own threads meet after every operation. On tiles that fit a core's cache an operation takes a tenth of a
millisecond, so they would wait more than work, and where other processes want the cores, too, they wait long.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, List, Optional, Tuple, TypeVar

import torch

from ..adapters import LoraFactors, tiles

T = TypeVar("T")
LEAST_MEMORY = 1 << 22  # float32 numbers


class Product:
    """dW of tiles of one matrix, from its factors."""

    def __init__(self, factors: LoraFactors) -> None:
        self.left, self.right = factors.operands()
        self.shape = factors.shape

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def tiles(self) -> List[slice]:
        return tiles(self.shape, self.left.device)

    def buffer(self) -> torch.Tensor:
        """Room for any of the tiles."""
        height = max((rows.stop - rows.start for rows in self.tiles()[:1]), default=0)
        return self.left.new_empty(height, self.shape[1])

    def rows(self, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
        """dW of a tile, in the buffer: bit for bit that of `LoraFactors.delta`."""
        return torch.mm(self.left[rows], self.right, out=buffer[: rows.stop - rows.start])


class TileWorkers:
    """A context in which tiles are worked on: by as many threads as torch has on a CPU, by the caller's own elsewhere."""

    def __init__(self) -> None:
        self._n_threads = torch.get_num_threads()
        self._pool: Optional[ThreadPoolExecutor] = None

    def __enter__(self) -> "TileWorkers":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def map(self, product: Product, make: Callable[[], Callable[[slice], T]], n_buffers: int) -> List[T]:
        """Work on every tile of a matrix.

        product (Product): Of the matrix, or of another one of its shape and device.
        make (Callable): Called once in each thread, for a function of a tile's rows that has buffers of its own.
        n_buffers (int): How many tiles these hold: threads that would need more than an eighth of the matrix rest.
        RETURNS (List[T]): What the function returned, in the order of the tiles.
        """
        todo = product.tiles()
        numbered = iter(enumerate(todo))  # shared: each thread takes the next
        if product.left.device.type != "cpu" or self._n_threads == 1:
            return [result for _, result in _work(numbered, make)]
        memory = max(product.size // 8, LEAST_MEMORY)
        in_use = n_buffers * max(1, product.buffer().numel())
        n_threads = min(self._n_threads, max(1, len(todo)), max(1, memory // in_use))
        parts = list(self._threads().map(lambda _: _work(numbered, make), range(n_threads)))
        done = dict(pair for part in parts for pair in part)
        return [done[number] for number in range(len(todo))]

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_threads, initializer=torch.set_num_threads, initargs=(1,))
            all_are_there = threading.Barrier(self._n_threads)
            list(self._pool.map(lambda _: all_are_there.wait(), range(self._n_threads)))
            torch.set_num_threads(self._n_threads)  # the last call decides for threads that torch does not know yet
        return self._pool


@torch.no_grad()  # of this thread
def _work(numbered: Iterator[Tuple[int, slice]], make: Callable[[], Callable[[slice], T]]) -> List[Tuple[int, T]]:
    work = make()
    return [(number, work(rows)) for number, rows in numbered]
