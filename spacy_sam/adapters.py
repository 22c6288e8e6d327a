"""PEFT LoRA adapters on disk: read, check that they can be merged exactly, hash."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import SamError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
# Settings under which the weight change is not scale * B @ A, or not of one scale and rank, or not of this base.
REFUSED = (
    "use_rslora",
    "use_dora",
    "lora_bias",
    "use_qalora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights


# Entries of a tile: on a CPU a core's cache holds the few that a merge needs, on a GPU one is worth a kernel's start.
TILE_SIZE, GPU_TILE_SIZE = 1 << 17, 1 << 20


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

    def check_shapes(self, shapes: Mapping[str, Tuple[int, ...]], name: str) -> None:
        """RAISES: SamError S403 or S107 if the base has no such weight, or one of another shape."""
        for matrix, factors in self.matrices.items():
            if matrix not in shapes:
                raise SamError("S403", matrix=matrix, expert=name)
            if tuple(shapes[matrix]) != factors.shape:
                problem = f"'{matrix}' is {list(factors.shape)} and the base's is {list(shapes[matrix])}"
                raise SamError("S107", name=name, problem=problem)


def read_adapter_config(folder: Path, name: str) -> Dict[str, Any]:
    """Read and check `adapter_config.json`.

    RAISES: SamError S104 if files are missing, S107 if the config is damaged, S106 for a kind that cannot be merged.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise SamError("S104", name=name, path=folder / file)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf8"))
        rank, alpha = config["r"], config["lora_alpha"]
        valid = isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float)) and math.isfinite(alpha)
    except (ValueError, KeyError, TypeError) as error:
        raise SamError("S107", name=name, problem=f"{CONFIG_FILE} cannot be read ({error!r})") from error
    if not valid:
        raise SamError("S107", name=name, problem=f"rank {rank!r} and alpha {alpha!r} make no scale")
    if config.get("peft_type") != "LORA":
        raise SamError("S106", name=name, feature=f"peft_type {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        raise SamError("S106", name=name, feature=f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        raise SamError("S106", name=name, feature=f"init_lora_weights={config['init_lora_weights']!r}")
    for feature in REFUSED:
        if config.get(feature):
            raise SamError("S106", name=name, feature=feature)
    return config


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
        module, _, factor = key.removeprefix(KEY_PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or tensor.dim() != 2:
            raise SamError("S107", name=name, problem=f"tensor '{key}' is not a LoRA factor of a linear layer")
        if not torch.isfinite(tensor).all():
            raise SamError("S107", name=name, problem=f"tensor '{key}' has NaN or infinite values")
        pairs.setdefault(module, {})[factor] = tensor.float()
    if not pairs:
        raise SamError("S107", name=name, problem="it has no tensors")
    scale = config["lora_alpha"] / config["r"]
    transposed = bool(config.get("fan_in_fan_out"))
    matrices = {
        f"{module}.weight": _pair(module, pair, scale, transposed, config["r"], name) for module, pair in pairs.items()
    }
    return Adapter(matrices)


def _pair(
    module: str, pair: Mapping[str, torch.Tensor], scale: float, transposed: bool, rank: int, name: str
) -> LoraFactors:
    if set(pair) != {"lora_A", "lora_B"}:
        raise SamError("S107", name=name, problem=f"'{module}' has {sorted(pair)} and needs lora_A and lora_B")
    a, b = pair["lora_A"], pair["lora_B"]
    if a.shape[0] != rank or b.shape[1] != rank:
        problem = f"'{module}' has factors {list(b.shape)} and {list(a.shape)}, and the config says rank {rank}"
        raise SamError("S107", name=name, problem=problem)
    return LoraFactors(a, b, scale, transposed)


def hash_adapter(folder: Path) -> str:
    """Content hash of an adapter: its weights file and the config entries that decide the weight change."""
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes())
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf8"))
    digest.update(repr([config.get(key) for key in ("r", "lora_alpha", "fan_in_fan_out")]).encode("utf8"))
    return digest.hexdigest()[:16]
