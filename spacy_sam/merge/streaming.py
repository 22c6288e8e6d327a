"""Merging from factors, by tiles of rows: no expert's dense task vector is ever whole in memory.

Results are those of the functions in `methods` on stacks of `LoraFactors.delta`, bit for bit: dW of a tile is computed
by the same products, and each entry by the same operations in the same order.
"""

import math
from functools import partial
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import SamError
from .factors import Method
from .methods import Mean, MergeMethod, TaskArithmetic, Ties
from .stacks import relative_weights
from .thresholds import Cut, find_cuts
from .workers import Product, TileWorkers

SMALL = 1 << 20  # entries of a matrix
GROUP = 8  # small matrices for each thread
Merge = Callable[[slice], Tensor]  # the merged dW of a tile's rows, in a buffer that the next call uses again


def can_stream(method: Method, n_experts: int) -> bool:
    """Whether a merge can be done by tiles. A single expert's can: no method has a part in it."""
    return n_experts == 1 or type(method) in (Ties, Mean, TaskArithmetic)


def merge_by_tiles(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    method: Method,
    original: Optional[Callable[[str], Tensor]] = None,
    order: Optional[Sequence[str]] = None,
) -> Iterator[Tuple[str, Tensor]]:
    """Merge matrix by matrix.

    Beside factors and results, each thread needs memory for a few tiles; all together take less than a fifth of a
    matrix, or 32 MB. With `trim="global"`, the borders of all matrices are found before the first is yielded.

    adapters (Mapping[str, Adapter]): The adapters of at least one expert, by name, on one device.
    weights (Sequence[float]): One for each, relative.
    method (Method): One that `can_stream`.
    original (Optional[Callable]): Gives the base's weight of a name, `[rows, columns]` of any floating dtype. None for
        merged task vectors alone.
    order (Optional[Sequence[str]]): The names of all matrices, as they shall be yielded: this changes no value. None for
        the order of the adapters.
    YIELDS (Tuple[str, Tensor]): Name, and base + merged dW, computed in float32 and rounded once to the base's dtype; or the
        merged dW in float32. The base's weights are left as they are.
    RAISES: SamError S401 for bad weights, S402 if the experts disagree on a shape, S410 for values that are too large.
    """
    matrices = order if order is not None else changed_matrices(adapters.values())
    for matrix in matrices:
        _check(adapters, matrix, getattr(method, "scale", 1.0))
    if not matrices:
        return
    relative = relative_weights(weights, len(adapters)) if len(adapters) > 1 else [1.0]
    with TileWorkers() as workers:
        cuts: Dict[str, Dict[str, Cut]] = {}
        if isinstance(method, Ties) and method.trim == "global" and len(adapters) > 1:
            cuts = global_cuts(adapters, method, workers)
        merge = partial(_merge_matrix, adapters, dict(zip(adapters, relative)), method, cuts, workers)
        for group in _groups(adapters, matrices, workers.n_threads):
            bases = [None if original is None else original(matrix) for matrix in group]
            jobs = [partial(merge, matrix, base) for matrix, base in zip(group, bases)]
            yield from zip(group, workers.each(jobs))


def _groups(adapters: Mapping[str, Adapter], matrices: Sequence[str], n_threads: int) -> Iterator[List[str]]:
    """What is merged at once: a matrix whose tiles keep all threads busy, or several small ones, each by one thread."""
    shapes = {matrix: factors.shape for each in adapters.values() for matrix, factors in each.matrices.items()}
    group: List[str] = []
    for matrix in matrices:
        is_small = n_threads > 1 and math.prod(shapes[matrix]) <= SMALL
        if group and (not is_small or len(group) == GROUP * n_threads):
            yield group
            group = []
        group.append(matrix)
        if not is_small:
            yield group
            group = []
    if group:
        yield group


def changed_matrices(adapters: Iterable[Adapter]) -> List[str]:
    """All matrices that any of them changes, each once, in the order of the adapters."""
    return list(dict.fromkeys(matrix for adapter in adapters for matrix in adapter.matrices))


def global_cuts(adapters: Mapping[str, Adapter], method: Ties, workers: TileWorkers) -> Dict[str, Dict[str, Cut]]:
    """What trimming each expert's whole task vector keeps: by expert, and by matrix.

    The whole vector is made of all matrices that any of the experts changes, with zeros where the one expert changes none.
    """
    sizes = {
        matrix: math.prod(factors.shape) for each in adapters.values() for matrix, factors in each.matrices.items()
    }
    n_keep = int(method.density * sum(sizes.values()))
    cuts: Dict[str, Dict[str, Cut]] = {}
    for name, adapter in adapters.items():
        changed = [matrix for matrix in sizes if matrix in adapter.matrices]
        products = [Product(adapter.matrices[matrix]) for matrix in changed]
        cuts[name] = dict(zip(changed, find_cuts(products, n_keep, workers)))
    return cuts


class TiesTiles:
    """TIES of one matrix's tiles: `methods.trim`, `elect_signs` and `disjoint_mean`, in one thread's buffers.

    Masks are numbers of 0 and 1 instead of booleans, which torch does not compute with as fast, and signs are
    multiplied out, so that the entries that agree are those above 0.
    """

    def __init__(
        self,
        products: Sequence[Product],
        weights: Sequence[float],
        cuts: Sequence[Cut],
        scale: float,
        workers: TileWorkers,
    ) -> None:
        self.products, self.weights, self.cuts, self.scale = products, weights, cuts, scale
        self.total, self.share, self.signs, self.spare, *self.vectors = (
            workers.buffer(number, products[0]) for number in range(4 + len(products))
        )

    def __call__(self, rows: slice) -> Tensor:
        height, start = rows.stop - rows.start, rows.start * self.total.shape[1]
        total, share, signs, spare = (each[:height] for each in (self.total, self.share, self.signs, self.spare))
        vectors = [product.rows(rows, buffer) for product, buffer in zip(self.products, self.vectors)]
        total.zero_()
        for vector, weight, cut in zip(vectors, self.weights, self.cuts):
            add_weighted(total, cut.trim_(vector, start), weight, spare)
        torch.ge(total, 0, out=signs).mul_(2).sub_(1)
        total.zero_()
        share.zero_()
        for vector, weight in zip(vectors, self.weights):
            vector.mul_(signs).clamp_(min=0)
            share.add_(torch.gt(vector, 0, out=spare), alpha=weight)  # exact: the product is the weight or 0
            add_weighted(total, vector, weight, spare)
        # What nobody agrees on is 0 / smallest. No weight is that small: see `relative_weights`.
        total.div_(share.clamp_(min=torch.finfo(share.dtype).tiny)).mul_(signs)
        return total if self.scale == 1 else total.mul_(self.scale)


def add_weighted(total: Tensor, vector: Tensor, weight: float, spare: Tensor) -> None:
    """Add weight * vector, in two operations as `methods` does; in one if the product is exact, so that none is rounded."""
    if math.frexp(weight)[0] == 0.5:
        total.add_(vector, alpha=weight)
    else:
        total.add_(torch.mul(vector, weight, out=spare))


def _merge_matrix(
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    method: Method,
    cuts: Mapping[str, Mapping[str, Cut]],
    workers: TileWorkers,
    matrix: str,
    base: Optional[Tensor],
) -> Tensor:
    """Base + merged dW of one matrix, or merged dW alone. cuts: By expert and matrix, if they are known already."""
    products = {name: Product(each.matrices[matrix]) for name, each in adapters.items() if matrix in each.matrices}
    known = {name: cuts[name][matrix] for name in products} if cuts else {}
    make = _maker(products, weights, method, known, workers)
    return _merged(next(iter(products.values())), make, base, matrix, workers, len(adapters))


def _maker(
    products: Mapping[str, Product],
    weights: Mapping[str, float],
    method: Method,
    cuts: Mapping[str, Cut],
    workers: TileWorkers,
) -> Callable[[], Merge]:
    """Makes the merge of one matrix's tiles, with buffers of its own.

    products (Mapping[str, Product]): Of the experts that change the matrix.
    weights (Mapping[str, float]): Of all experts.
    cuts (Mapping[str, Cut]): If they are known already.
    """
    if len(weights) == 1:
        (product,) = products.values()
        return lambda: _single(product, workers)
    if not isinstance(method, Ties):
        return lambda: _linear(products, weights, method, workers)
    chosen = list(products.values())
    found = list(cuts.values()) or [
        find_cuts([product], int(method.density * product.size), workers)[0] for product in chosen
    ]
    return lambda: TiesTiles(chosen, [weights[name] for name in products], found, method.scale, workers)


def _single(product: Product, workers: TileWorkers) -> Merge:
    buffer = workers.buffer(0, product)
    return lambda rows: product.rows(rows, buffer)


def _linear(
    products: Mapping[str, Product], weights: Mapping[str, float], method: Method, workers: TileWorkers
) -> Merge:
    """A method that treats each entry alone, on stacks of tiles."""
    assert isinstance(method, MergeMethod)  # as `can_stream` has it
    some = workers.buffer(0, next(iter(products.values())))
    stack = some.new_zeros((len(weights), *some.shape))

    def merge(rows: slice) -> Tensor:
        for name, buffer in zip(weights, stack):
            if name in products:
                products[name].rows(rows, buffer)
        return method(stack[:, : rows.stop - rows.start], list(weights.values()))

    return merge


def _merged(
    product: Product,
    make: Callable[[], Merge],
    base: Optional[Tensor],
    matrix: str,
    workers: TileWorkers,
    n_experts: int,
) -> Tensor:
    """Gather the merged tiles of one matrix, added to the base's."""
    if base is None:
        result = product.left.new_empty(product.shape)
    else:
        base = base.detach()
        result = torch.empty_like(base, memory_format=torch.contiguous_format)

    def make_work() -> Callable[[slice], None]:
        merge = make()

        def work(rows: slice) -> None:
            if base is None:
                result[rows] = merge(rows)
            else:
                add_rounded(base[rows], merge(rows), matrix, out=result[rows])

        return work

    workers.map(product, make_work, n_buffers=n_experts + 4)
    return result


def add_rounded(base: Tensor, delta: Tensor, matrix: str, out: Optional[Tensor] = None) -> Tensor:
    """Base + dW, rounded once to the base's dtype.

    RAISES: SamError S410 if that cannot hold a value of the sum.
    """
    base, delta = base.detach(), delta.to(base.device)
    result = torch.empty_like(base) if out is None else out
    torch.add(base, delta, out=result)  # computed in the wider of the two dtypes
    if result.dtype == torch.float16 and _is_overflow(base, result):
        raise SamError("S410", matrix=matrix, dtype=result.dtype)
    return result


def _is_overflow(base: Tensor, result: Tensor) -> bool:
    """Whether a finite value became infinite. Most often one look is enough."""
    return not bool(result.isfinite().all()) and bool((base.isfinite() & ~result.isfinite()).any())


def _check(adapters: Mapping[str, Adapter], matrix: str, scale: float) -> None:
    """RAISES: SamError S402 if the experts disagree on a shape, S410 if the merge could leave float32."""
    factors = [each.matrices[matrix] for each in adapters.values() if matrix in each.matrices]
    shapes = {each.shape for each in factors}
    if len(shapes) > 1:
        raise SamError("S402", matrix=matrix, shapes=sorted(shapes))
    bounds: List[float] = []
    for each in factors:
        largest = [float(factor.abs().max()) if factor.numel() else 0.0 for factor in (each.a, each.b)]
        bounds.append(abs(each.scale) * each.a.shape[0] * largest[0] * largest[1])
    if not sum(bounds) * max(1.0, scale) < torch.finfo(torch.float32).max:  # NaN is not, either
        raise SamError("S410", matrix=matrix, dtype=torch.float32)
