"""Task models in a loaded model: merged weights are put into its parameters in place, and taken out again."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any, Callable, Dict, Generator, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoraFactors
from ..errors import SamError
from ..plan import TaskModelSpec
from .methods import Mean, MergeMethod
from .streaming import add_rounded, can_stream, changed_matrices, merge_by_tiles

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def merged_deltas(
    adapters: Mapping[str, Adapter],
    spec: TaskModelSpec,
    method: MergeMethod,
    order: Optional[Sequence[str]] = None,
) -> Iterator[Tuple[str, Tensor]]:
    """Merge the task vectors of a task model, one matrix at a time: only one is dense at any moment.

    An expert that does not change a matrix has a task vector of zeros there. A single expert's is not merged at all.

    adapters (Mapping[str, Adapter]): The adapters of `spec.experts`, by name.
    spec (TaskModelSpec): Experts and weights; no experts, no matrices.
    method (MergeMethod): The merge of one matrix.
    order (Optional[Sequence[str]]): Names of all changed matrices, as they shall be yielded; None for that of the adapters.
    YIELDS (Tuple[str, Tensor]): Name of the base's weight, and the merged dW in float32, in the base's layout.
    RAISES: SamError S402 if the experts disagree on a shape, S401 for weights that the method refuses.
    """
    chosen = {name: adapters[name] for name in spec.experts}
    if can_stream(method, len(chosen)):
        yield from merge_by_tiles(chosen, spec.weights, method, order=order)
        return
    for matrix in changed_matrices(chosen.values()) if order is None else order:
        yield matrix, method(_stack(chosen.values(), matrix), spec.weights)


def merged_weights(
    adapters: Mapping[str, Adapter],
    spec: TaskModelSpec,
    method: MergeMethod,
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


class WeightSwitch:
    """Switches one loaded model between the task models of a bank.

    The originals of the weights that were ever changed are kept beside the model, so the base always comes back bit for
    bit. The model must not be moved, retyped or trained meanwhile. Merged weights are remembered by the task model's
    fingerprint, which knows experts by name: after an expert was replaced, make a new switch.
    """

    def __init__(
        self,
        model: nn.Module,
        load_adapter: Callable[[str], Adapter],
        resolve: Callable[[Dict[str, Any]], MergeMethod],
        max_cache_bytes: int = 1 << 30,
    ) -> None:
        """Wrap a model. Nothing is read or changed yet.

        model (nn.Module): The base, with parameters under the names that adapters use.
        load_adapter (Callable): Reads an expert's factors by name.
        resolve (Callable): Makes the merge method of a task model's config block.
        max_cache_bytes (int): Memory for merged weights; the task models used longest ago go first. A task model
            that does not fit alone is merged anew each time.
        """
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._ties = tied_names(self._parameters)
        self._load_adapter = load_adapter
        self._resolve = resolve
        self._max_cache_bytes = max_cache_bytes
        self._cache: OrderedDict[str, Dict[str, Tensor]] = OrderedDict()
        self._originals: Dict[str, Tensor] = {}
        self._changed: Set[str] = set()
        self._active = TaskModelSpec()

    @property
    def active(self) -> TaskModelSpec:
        """The task model whose weights are in the model now; without experts if that is the base."""
        return self._active

    @torch.no_grad()
    def use(self, spec: TaskModelSpec) -> None:
        """Put a task model's weights into the model: base + merged dW in float32, rounded once to the weight's dtype.

        spec (TaskModelSpec): The task model; the base if it has no experts.
        RAISES: SamError S403 (no such weight), S107 (other shape), S404 (tied weight) and S405 (quantised weight), and
            what reading adapters and resolving the method raise: the model is then as it was. After any later error,
            such as memory running out, the base is back.
        """
        if spec == self._active:
            return
        if not spec.experts:
            self.restore()
            return
        cached = self._cache.get(spec.fingerprint)
        if cached is not None:
            self._cache.move_to_end(spec.fingerprint)
            self._write(spec, list(cached), cached.items())
            return
        adapters = {name: self._read(name) for name in spec.experts}
        method = self._resolve(spec.method) if len(adapters) > 1 else Mean()
        self._write(spec, changed_matrices(adapters.values()), self._merge(adapters, spec, method))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base's weights back, bit for bit."""
        self._reset(set(self._changed))
        self._active = TaskModelSpec()

    def _read(self, name: str) -> Adapter:
        """Read an expert, check that it can be merged here, and put its factors where the weights are."""
        adapter = self._load_adapter(name)
        check_mergeable(adapter, name, self._parameters, self._ties)
        return Adapter({key: _placed(factors, self._parameters[key]) for key, factors in adapter.matrices.items()})

    def _merge(
        self, adapters: Mapping[str, Adapter], spec: TaskModelSpec, method: MergeMethod
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield the merged weights one by one, and remember them at the end if there is memory for them."""
        merged: Dict[str, Tensor] = {}
        fits = self._make_room(sum(self._parameters[matrix].nbytes for matrix in changed_matrices(adapters.values())))
        for matrix, weight in merged_weights(adapters, spec, method, self._original):
            if fits:
                merged[matrix] = weight
            yield matrix, weight
        if fits:
            self._cache[spec.fingerprint] = merged

    def _write(self, spec: TaskModelSpec, matrices: List[str], weights: Iterable[Tuple[str, Tensor]]) -> None:
        try:
            self._reset(self._changed.difference(matrices))
            for matrix, weight in weights:
                self._original(matrix)
                self._changed.add(matrix)
                self._parameters[matrix].copy_(weight)
        except BaseException:
            self.restore()
            raise
        self._active = spec

    def _original(self, matrix: str) -> Tensor:
        """The base's weight. It is copied at the first call, which must come before the first change."""
        if matrix not in self._originals:
            self._originals[matrix] = self._parameters[matrix].detach().clone()
        return self._originals[matrix]

    def _reset(self, matrices: Set[str]) -> None:
        for matrix in matrices:
            self._parameters[matrix].copy_(self._originals[matrix])
            self._changed.discard(matrix)

    def _make_room(self, n_bytes: int) -> bool:
        """Drop what was used longest ago until `n_bytes` more fit; drop nothing if they never can."""
        if n_bytes > self._max_cache_bytes:
            return False
        while n_bytes + sum(_n_bytes(weights) for weights in self._cache.values()) > self._max_cache_bytes:
            self._cache.popitem(last=False)
        return True


def check_mergeable(adapter: Adapter, name: str, parameters: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    """Check that an expert can be merged into a base.

    parameters (Mapping[str, Tensor]): The base's, under all their names.
    ties (Mapping[str, str]): Another name of each that has several; see `tied_names`.
    RAISES: SamError S405 (quantised weight), S404 (tied weight), S403 (no such weight) or S107 (other shape).
    """
    for matrix in adapter.matrices:
        parameter = parameters.get(matrix)
        if parameter is not None and parameter.dtype not in FLOATS:
            raise SamError("S405", expert=name, matrix=matrix, dtype=parameter.dtype)
        if matrix in ties:
            raise SamError("S404", expert=name, matrix=matrix, other=ties[matrix])
    adapter.check_shapes({key: tuple(parameter.shape) for key, parameter in parameters.items()}, name)


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


def _placed(factors: LoraFactors, parameter: Tensor) -> LoraFactors:
    """Factors on the weight's device if that is a CUDA device, where merging is faster, else on the CPU."""
    device = parameter.device if parameter.device.type == "cuda" else torch.device("cpu")
    return replace(factors, a=factors.a.to(device), b=factors.b.to(device))


def tied_names(parameters: Mapping[str, Tensor]) -> Dict[str, str]:
    """For each parameter that has several names, or that shares its memory: another name of it."""
    groups: Dict[Tuple[torch.device, int], List[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.device, parameter.data_ptr() or id(parameter)), []).append(name)
    tied = [names for names in groups.values() if len(names) > 1]
    return {name: names[0] if name != names[0] else names[1] for names in tied for name in names}


def _n_bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())
