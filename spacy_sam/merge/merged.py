"""The merged task vectors of a task model, one matrix at a time: dense, added to the base's weights, or as low-rank factors."""

from typing import Callable, Generator, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors
from ..errors import SamError
from ..plan import TaskModelSpec
from .factors import FactorMethod, Method, concatenate, no_change
from .methods import Mean, TaskArithmetic
from .streaming import add_rounded, can_stream, changed_matrices, merge_by_tiles

# Registered methods whose merges have exact low-rank factors.
LOW_RANK = tuple(
    f"spacy_sam.{name}.v1" for name in ("Mean", "TaskArithmetic", "STAR", "IsoC", "TSVM", "KnOTS", "CoreSpace")
)


def merged_deltas(
    adapters: Mapping[str, Adapter], spec: TaskModelSpec, method: Method, order: Optional[Sequence[str]] = None
) -> Iterator[Tuple[str, Tensor]]:
    """Merge the task vectors of a task model, one matrix at a time: only one is dense at any moment.

    An expert that does not change a matrix has a task vector of zeros there. A single expert's is not merged at all.

    adapters (Mapping[str, Adapter]): The adapters of `spec.experts`, by name.
    spec (TaskModelSpec): Experts and weights; no experts, no matrices.
    method (Method): The merge of one matrix, on dense task vectors or on factors.
    order (Optional[Sequence[str]]): Names of all changed matrices, as they shall be yielded; None for that of the adapters.
    YIELDS (Tuple[str, Tensor]): Name of the base's weight, and the merged dW in float32, in the base's layout.
    RAISES: SamError S402 if the experts disagree on a shape, S401 for weights that the method refuses, S407 for NaN and
        infinite values.
    """
    if isinstance(method, FactorMethod):
        for matrix, factors in merged_factors(adapters, spec, method, order):
            yield matrix, factors.delta()
        return
    chosen = {name: adapters[name] for name in spec.experts}
    if can_stream(method, len(chosen)):
        yield from merge_by_tiles(chosen, spec.weights, method, order=order)
        return
    for matrix in changed_matrices(chosen.values()) if order is None else order:
        yield matrix, method(_stack(chosen.values(), matrix), spec.weights)


def merged_weights(
    adapters: Mapping[str, Adapter],
    spec: TaskModelSpec,
    method: Method,
    original: Callable[[str], Tensor],
    order: Optional[Sequence[str]] = None,
) -> Generator[Tuple[str, Tensor], None, None]:
    """Base + merged task vector, computed in float32 and rounded once to the base's dtype, one matrix at a time.

    original (Callable): Gives the base's weight of a name; it is not changed.
    YIELDS (Tuple[str, Tensor]): Name, and new weight. Other arguments as in `merged_deltas`.
    RAISES: SamError S410 if the base's dtype cannot hold a value, and what `merged_deltas` raises.
    """
    chosen = {name: adapters[name] for name in spec.experts}
    if can_stream(method, len(chosen)):
        yield from merge_by_tiles(chosen, spec.weights, method, original, order)
        return
    for matrix, delta in merged_deltas(adapters, spec, method, order):
        yield matrix, add_rounded(original(matrix), delta, matrix)


def merged_factors(
    adapters: Mapping[str, Adapter], spec: TaskModelSpec, method: Method, order: Optional[Sequence[str]] = None
) -> Iterator[Tuple[str, LoraFactors]]:
    """The merged task vectors of a task model as exact low-rank factors, one matrix at a time.

    Methods on factors have them, and so have `Mean` and `TaskArithmetic`, by concatenation. Ranks differ from matrix to
    matrix; none is above the sum of the experts' ranks there. A single expert's factors are its own, whatever the method.

    adapters (Mapping[str, Adapter]): The adapters of `spec.experts`, by name.
    spec (TaskModelSpec): Experts and weights; no experts, no matrices.
    method (Method): The merge of one matrix.
    order (Optional[Sequence[str]]): As in `merged_deltas`.
    YIELDS (Tuple[str, LoraFactors]): Name of the base's weight and factors of its change.
    RAISES: SamError S406 at once if the method's changes have no such factors, S402 if the experts disagree on a shape, S401
        for weights that the method refuses, S407 for NaN and infinite values.
    """
    if len(spec.experts) > 1 and not isinstance(method, (FactorMethod, Mean, TaskArithmetic)):
        raise SamError("S406", method=type(method).__name__, known=", ".join(LOW_RANK))
    chosen = [adapters[name] for name in spec.experts]
    return _merged_factors(chosen, spec, method, changed_matrices(chosen) if order is None else order)


def _merged_factors(
    chosen: List[Adapter], spec: TaskModelSpec, method: Method, order: Sequence[str]
) -> Iterator[Tuple[str, LoraFactors]]:
    for matrix in order:
        factors = _factors(chosen, matrix)
        if len(factors) == 1:
            yield matrix, factors[0]
        elif isinstance(method, FactorMethod):
            yield matrix, method.merge_factors(factors, spec.weights)
        else:
            # A linear method's coefficients are what it makes of the unit vectors.
            coefficients = method(torch.eye(len(factors), dtype=torch.float64), spec.weights)
            yield matrix, concatenate(factors, coefficients.tolist())


def _factors(adapters: Iterable[Adapter], matrix: str) -> List[LoraFactors]:
    """Factors of one matrix by each expert, of rank 0 where it does not change it."""
    given = [adapter.matrices.get(matrix) for adapter in adapters]
    some = [each for each in given if each is not None]
    shapes = {each.shape for each in some}
    if len(shapes) > 1:
        raise SamError("S402", matrix=matrix, shapes=sorted(shapes))
    return [each if each is not None else no_change(some[0]) for each in given]


def _stack(adapters: Iterable[Adapter], matrix: str) -> Tensor:
    """Dense task vectors of one matrix: `[n_experts, *shape]`, float32."""
    factors = [adapter.matrices.get(matrix) for adapter in adapters]
    shapes = {each.shape for each in factors if each is not None}
    if len(shapes) > 1:
        raise SamError("S402", matrix=matrix, shapes=sorted(shapes))
    some = next(each for each in factors if each is not None)
    stack = some.b.new_zeros((len(factors), *some.shape))
    for row, each in zip(stack, factors):
        if each is not None:
            row.copy_(each.delta())
    return stack
