"""Task models in a loaded model: merged weights are put into its parameters in place, and taken out again."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Set, Tuple

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoraFactors
from ..errors import SamError
from ..plan import TaskModelSpec
from .methods import Mean, MergeMethod

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def merged_deltas(
    adapters: Mapping[str, Adapter], spec: TaskModelSpec, method: MergeMethod
) -> Iterator[Tuple[str, Tensor]]:
    """Merge the task vectors of a task model, one matrix at a time: only one is dense at any moment.

    An expert that does not change a matrix has a task vector of zeros there. A single expert's is not merged at all.

    adapters (Mapping[str, Adapter]): The adapters of `spec.experts`, by name.
    spec (TaskModelSpec): Experts and weights; no experts, no matrices.
    method (MergeMethod): The merge of one matrix.
    YIELDS (Tuple[str, Tensor]): Name of the base's weight, and the merged dW in float32, in the base's layout.
    RAISES: SamError S402 if the experts disagree on a shape, S401 for weights that the method refuses.
    """
    chosen = [adapters[name] for name in spec.experts]
    for matrix in _matrices(chosen):
        if len(chosen) == 1:
            yield matrix, chosen[0].matrices[matrix].delta()
        else:
            yield matrix, method(_stack(chosen, matrix), spec.weights)


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
        self._ties = _tied_names(self._parameters)
        self._transposed = _transposed(model)
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
        self._write(spec, _matrices(adapters.values()), self._merge(adapters, spec, method))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base's weights back, bit for bit."""
        self._reset(set(self._changed))
        self._active = TaskModelSpec()

    def _read(self, name: str) -> Adapter:
        """Read an expert, check that it can be merged here, and put its factors where the weights are."""
        adapter = _fitted(self._load_adapter(name), name, self._parameters, self._ties, self._transposed)
        return Adapter({key: _placed(factors, self._parameters[key]) for key, factors in adapter.matrices.items()})

    def _merge(
        self, adapters: Mapping[str, Adapter], spec: TaskModelSpec, method: MergeMethod
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield the merged weights one by one, and remember them at the end if there is memory for them."""
        merged: Dict[str, Tensor] = {}
        fits = self._make_room(sum(self._parameters[matrix].nbytes for matrix in _matrices(adapters.values())))
        for matrix, delta in merged_deltas(adapters, spec, method):
            original = self._original(matrix)
            # A sum of two dtypes is computed in the wider one, so this rounds once, at the end.
            weight = (original + delta.to(original.device)).to(original.dtype)
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


def check_fit(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Check that an adapter can be merged into a model, of which only the structure is needed.

    model (nn.Module): The base, on any device; on `meta` it has no weights.
    adapter (Adapter): The adapter.
    name (str): The expert's name, for messages.
    RAISES: SamError S403, S107, S404 or S405, as `WeightSwitch.use`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _fitted(adapter, name, parameters, _tied_names(parameters), _transposed(model))


def _fitted(
    adapter: Adapter,
    name: str,
    parameters: Mapping[str, Tensor],
    ties: Mapping[str, str],
    transposed: Mapping[str, bool],
) -> Adapter:
    """The adapter in the base's layout, if it can be merged there."""
    for matrix in adapter.matrices:
        parameter = parameters.get(matrix)
        if parameter is not None and parameter.dtype not in FLOATS:
            raise SamError("S405", expert=name, matrix=matrix, dtype=parameter.dtype)
        if matrix in ties:
            raise SamError("S404", expert=name, matrix=matrix, other=ties[matrix])
    fitted = adapter.laid_out(transposed)
    fitted.check_shapes({key: tuple(parameter.shape) for key, parameter in parameters.items()}, name)
    return fitted


def _transposed(model: nn.Module) -> Dict[str, bool]:
    """For the weight of each linear layer, whether it is kept as [in, out]: transformers' Conv1D does that (GPT-2)."""
    from transformers.pytorch_utils import Conv1D

    layers = [
        (name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, (nn.Linear, Conv1D))
    ]
    return {f"{name}.weight": isinstance(layer, Conv1D) for name, layer in layers}


def _matrices(adapters: Iterable[Adapter]) -> List[str]:
    """All matrices that any of them changes, each once, in the order of the adapters."""
    return list(dict.fromkeys(matrix for adapter in adapters for matrix in adapter.matrices))


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


def _tied_names(parameters: Mapping[str, Tensor]) -> Dict[str, str]:
    """For each parameter that has several names, or that shares its memory: another name of it."""
    groups: Dict[Tuple[torch.device, int], List[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.device, parameter.data_ptr() or id(parameter)), []).append(name)
    tied = [names for names in groups.values() if len(names) > 1]
    return {name: names[0] if name != names[0] else names[1] for names in tied for name in names}


def _n_bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())
