"""Task models in a loaded model: merged weights are put into its parameters in place, and taken out again."""

from contextlib import closing
from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from .. import __version__
from ..adapters import Adapter, LoraFactors
from ..errors import SamError
from ..plan import TaskModelSpec, fingerprint
from .cache import Damaged, MemoryCache, MergedCache
from .factors import Method
from .merged import merged_weights
from .methods import Mean
from .streaming import changed_matrices

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightSwitch:
    """Switches one loaded model between the task models of a bank.

    The originals of the weights that were ever changed are kept beside the model, so the base always comes back bit for
    bit. The model must not be moved, retyped or trained meanwhile. Task models are told apart by the versions of their experts,
    so that after an expert was replaced nothing of the old one is used. One thread may use it at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        load_adapter: Callable[..., Adapter],
        resolve: Callable[[Dict[str, Any]], Method],
        max_cache_bytes: int = 1 << 30,
        adapter_hash: Optional[Callable[[str], str]] = None,
        stored: Optional[MergedCache] = None,
    ) -> None:
        """Wrap a model. Nothing is read or changed yet.

        model (nn.Module): The base, with parameters under the names that adapters use.
        load_adapter (Callable): Reads an expert's factors by name, and by version if the task model says versions.
        resolve (Callable): Makes the merge method of a task model's config block.
        max_cache_bytes (int): Memory for merged weights; the task models used longest ago go first. A task model
            that does not fit alone is merged anew each time.
        adapter_hash (Optional[Callable]): The version that an expert has now, by name; asked for task models that say none. None:
            experts have one version for as long as this switch is used.
        stored (Optional[MergedCache]): Where merged weights are kept on disk. Single experts are not: they are not merged.
        """
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._ties = _tied_names(self._parameters)
        self._transposed = _transposed(model)
        self._load_adapter = load_adapter
        self._resolve = resolve
        self._adapter_hash = adapter_hash
        self._stored = stored
        self.cache = MemoryCache(max_cache_bytes)
        self._originals: Dict[str, Tensor] = {}
        self._changed: Set[str] = set()
        self._active: Optional[TaskModelSpec] = TaskModelSpec()

    @property
    def active(self) -> Optional[TaskModelSpec]:
        """The task model whose weights are in the model now; without experts if that is the base.

        None while one is being written, and in a process that was forked meanwhile, until the next use.
        """
        return self._active

    @torch.no_grad()
    def use(self, spec: TaskModelSpec) -> None:
        """Put a task model's weights into the model: base + merged dW in float32, rounded once to the weight's dtype.

        spec (TaskModelSpec): The task model; the base if it has no experts.
        RAISES: SamError S403 (no such weight), S107 (other shape), S404 (tied weight) and S405 (quantised weight), and
            what reading adapters and resolving the method raise: the model is then as it was. After any later error,
            such as memory running out, the base is back.
        """
        spec = self._of_versions(spec)
        if spec == self._active:
            return
        if not spec.experts:
            self.restore()
            return
        cached = self.cache.get(spec.fingerprint)
        if cached is not None:
            self._write(spec, list(cached), cached.items())
            return
        method = self._resolve(spec.method) if len(spec.experts) > 1 else Mean()
        name = self._stored_name(spec, method)
        if name is None or not self._use_stored(spec, name):
            self._use_merged(spec, name, method)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base's weights back, bit for bit."""
        self._active = None
        self._reset(set(self._changed))
        self._active = TaskModelSpec()

    def _of_versions(self, spec: TaskModelSpec) -> TaskModelSpec:
        if spec.adapter_hashes or self._adapter_hash is None:
            return spec
        return spec.of_versions({name: self._adapter_hash(name) for name in spec.experts})

    def _use_merged(self, spec: TaskModelSpec, name: Optional[str], method: Method) -> None:
        """Merge, and keep the weights in memory and under their name on disk."""
        versions = dict(zip(spec.experts, spec.adapter_hashes))
        adapters = {expert: self._read(expert, versions.get(expert)) for expert in spec.experts}
        matrices = changed_matrices(adapters.values())
        weights = self._merge(adapters, spec, method)
        if self._stored is not None and name is not None:
            weights = self._stored.keep(name, {matrix: self._parameters[matrix] for matrix in matrices}, weights)
        size = sum(self._parameters[matrix].nbytes for matrix in matrices)
        self._write(spec, matrices, self.cache.keep(spec.fingerprint, size, weights))

    def _use_stored(self, spec: TaskModelSpec, name: str) -> bool:
        """Use what is on disk. RETURNS (bool): Whether there is something, and it is sound."""
        assert self._stored is not None
        found = self._stored.open(name, self._parameters)
        if found is None:
            return False
        weights = ((matrix, weight.to(self._parameters[matrix].device)) for matrix, weight in found)
        try:
            with closing(found):
                self._write(spec, found.matrices, self.cache.keep(spec.fingerprint, found.n_bytes, weights))
        except Damaged as error:
            self._stored.discard(name, error)
            return False
        return True

    def _stored_name(self, spec: TaskModelSpec, method: Method) -> Optional[str]:
        """A name on disk, of all that decides merged weights: they are rounded as the device and this version do it."""
        if self._stored is None or len(spec.experts) < 2 or not spec.adapter_hashes:
            return None
        kinds = sorted({f"{parameter.dtype} {parameter.device.type}" for parameter in self._parameters.values()})
        adapters = sorted(zip(spec.adapter_hashes, spec.weights))
        return fingerprint([__version__, self._stored.base, adapters, method.config, kinds])

    def _read(self, name: str, version: Optional[str]) -> Adapter:
        """Read an expert, check that it can be merged here, and put its factors where the weights are."""
        loaded = self._load_adapter(name) if version is None else self._load_adapter(name, version)
        adapter = _fitted(loaded, name, self._parameters, self._ties, self._transposed)
        return Adapter({key: _placed(factors, self._parameters[key]) for key, factors in adapter.matrices.items()})

    def _merge(
        self, adapters: Mapping[str, Adapter], spec: TaskModelSpec, method: Method
    ) -> Iterator[Tuple[str, Tensor]]:
        """Yield the merged weights one by one."""
        return merged_weights(adapters, spec, method, self._original)

    def _write(self, spec: TaskModelSpec, matrices: List[str], weights: Iterable[Tuple[str, Tensor]]) -> None:
        self._active = None
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


def fit(model: nn.Module, adapter: Adapter, name: str) -> Adapter:
    """An adapter in the layout of a model, if it can be merged there. Only the model's structure is needed.

    model (nn.Module): The base, on any device; on `meta` it has no weights.
    adapter (Adapter): The adapter.
    name (str): The expert's name, for messages.
    RAISES: SamError S403, S107, S404 or S405, as `WeightSwitch.use`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return _fitted(adapter, name, parameters, _tied_names(parameters), _transposed(model))


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
