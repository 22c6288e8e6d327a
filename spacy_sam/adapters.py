"""PEFT LoRA adapters on disk: read, check that they can be merged exactly, hash."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import SamError
from .lora_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    alpha_choices,
    deciding_entries,
    rank_choices,
    read_adapter_config,
    scale_of,
)

KEY_PREFIX = "base_model.model."
BASE_COPY = "peft would put it in the place of the base's own weight (`bank add --domain` leaves out equal copies)"
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


# Entries of a tile: on a CPU a core's cache holds the few that a merge needs, on a GPU one is worth a kernel's start.
TILE_SIZE, GPU_TILE_SIZE = 1 << 18, 1 << 20


@dataclass(frozen=True)
class LoraFactors:
    """One matrix's task vector in factors: dW = (scale * B) @ A.

    a: [rank, in], b: [out, rank], both float32.
    transposed: The base keeps this weight as [in, out] (GPT-2's Conv1D).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> Tuple[int, int]:
        """Shape of dW as the base stores the weight."""
        out_in = (self.b.shape[0], self.a.shape[1])
        return (out_in[1], out_in[0]) if self.transposed else out_in

    def operands(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """Two float32 matrices, [rows, rank] and [rank, columns], whose product is dW in the base's layout."""
        a, b = self.a.float(), self.scale * self.b.float()
        return (a.T, b.T) if self.transposed else (b, a)

    def delta(self) -> torch.Tensor:
        """dW in float32, in the base's layout.

        It is computed by the tiles that merging uses (`tiles`): products of other sizes may be rounded otherwise.
        """
        left, right = self.operands()
        dense = left.new_empty(self.shape)
        for rows in tiles(self.shape, left.device):
            torch.mm(left[rows], right, out=dense[rows])
        return dense


def tiles(shape: Tuple[int, int], device: torch.device) -> List[slice]:
    """The rows of each tile of a matrix, in order.

    Tiles begin at multiples of 8 rows. Matrix products are then rounded as that of the whole matrix is, as far as it
    was tried; with odd remainders they are not.
    """
    n_rows, n_columns = shape
    size = TILE_SIZE if device.type == "cpu" else GPU_TILE_SIZE
    height = max(8, size // max(n_columns, 1) // 8 * 8)
    return [slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height)]


@dataclass(frozen=True)
class Adapter:
    """All factors of one expert, by the name of the base weight they change (`...q_proj.weight`)."""

    matrices: Dict[str, LoraFactors]

    def laid_out(self, transposed: Mapping[str, bool]) -> "Adapter":
        """The same weight change, laid out as the base's layers keep their weights.

        A config has one `fan_in_fan_out` for all layers, but peft decides for each layer by its class, and so does this.

        transposed (Mapping[str, bool]): For the weight of each linear layer, whether the base keeps it as [in, out].
        """
        matrices = {
            key: replace(factors, transposed=transposed.get(key, factors.transposed))
            for key, factors in self.matrices.items()
        }
        return Adapter(matrices)

    def check_shapes(self, shapes: Mapping[str, Tuple[int, ...]], name: str, either_way: bool = False) -> None:
        """Compare with the shapes of the base's weights.

        either_way (bool): Take the transposed shape too, where the classes of the base's layers are not known.
        RAISES: SamError S403 or S107 if the base has no such weight, or one of another shape.
        """
        for matrix, factors in self.matrices.items():
            if matrix not in shapes:
                raise SamError("S403", matrix=matrix, expert=name)
            good = {factors.shape, factors.shape[::-1]} if either_way else {factors.shape}
            if tuple(shapes[matrix]) not in good:
                problem = f"'{matrix}' is {list(factors.shape)} and the base's is {list(shapes[matrix])}"
                raise SamError("S107", name=name, problem=problem)


def read_adapter(folder: Path, name: str) -> Adapter:
    """Read an expert's factors and check them.

    folder (Path): A PEFT adapter folder.
    name (str): The expert's name, for messages.
    RETURNS (Adapter): float32 factors on the CPU.
    RAISES: SamError S104, S106 or S107: missing files, a kind that cannot be merged exactly, damaged tensors.
    """
    config = read_adapter_config(folder, name)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise SamError("S107", name=name, problem=f"{WEIGHTS_FILE} cannot be read ({error})") from error
    pairs: Dict[str, Dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if is_base_copy(key):
            raise SamError("S106", name=name, feature=f"its own copy of '{key}'", reason=BASE_COPY)
        module, _, factor = key.removeprefix(KEY_PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in (*LINEAR, *EMBEDDING) or tensor.dim() != 2:
            raise SamError(
                "S107", name=name, problem=f"tensor '{key}' is not a LoRA factor of a linear layer or an embedding"
            )
        if not torch.isfinite(tensor).all():
            raise SamError("S107", name=name, problem=f"tensor '{key}' has NaN or infinite values")
        pairs.setdefault(module, {})[factor] = tensor.float()
    if not pairs:
        raise SamError("S107", name=name, problem="it has no tensors")
    return Adapter({f"{module}.weight": _pair(module, pair, config, name) for module, pair in pairs.items()})


def is_base_copy(key: str) -> bool:
    """Whether a tensor is a weight of the base that peft saved beside the factors, as it does for embeddings.

    key (str): Name of the tensor in the adapter's file.
    """
    owner, _, last = key.rpartition(".")
    return last == "weight" and owner.rpartition(".")[2] not in LINEAR and "lora_" not in owner


def _pair(module: str, pair: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str) -> LoraFactors:
    kind = next((kind for kind in (LINEAR, EMBEDDING) if set(pair) == set(kind)), None)
    if kind is None:
        raise SamError("S107", name=name, problem=f"'{module}' has {sorted(pair)} and needs lora_A and lora_B")
    a, b = (pair[factor] for factor in kind)
    rank, ranks, alphas = a.shape[0], rank_choices(config, module), alpha_choices(config, module)
    if rank != b.shape[1] or rank not in ranks:
        said = " or ".join(map(str, sorted(ranks)))
        problem = f"'{module}' has factors {list(b.shape)} and {list(a.shape)}, and the config says rank {said}"
        raise SamError("S107", name=name, problem=problem)
    if len(alphas) > 1:
        reason = f"several patterns match '{module}' (alpha {sorted(alphas)}), and peft does not keep their order"
        raise SamError("S106", name=name, feature="alpha_pattern", reason=reason)
    scale = scale_of(config, rank, alphas.pop())
    # An embedding keeps a row for each token: [in, out], whatever the config says of linear layers.
    return LoraFactors(a, b, scale, transposed=kind == EMBEDDING or bool(config.get("fan_in_fan_out")))


def hash_adapter(folder: Path) -> str:
    """Content hash of an adapter: its weights file and the config entries that decide the weight change."""
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes())
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf8"))
    digest.update(repr(deciding_entries(config)).encode("utf8"))
    return digest.hexdigest()[:16]
