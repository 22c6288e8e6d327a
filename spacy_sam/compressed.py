"""Compressed experts on disk: read, check, write, hash. `compress` makes them.

A direction is one column of B and one row of A. Its numbers are codes of 1 to 8 bits into a table of levels that is in the file.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, Mapping, Tuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapters import Adapter, LoraFactors
from .errors import SamError
from .plan import Strict, from_json, to_json

FORMAT_VERSION = 1
HEAD_FILE, DATA_FILE = "compressed.json", "compressed.safetensors"
MAX_WIDTH = 8
DTYPES = {"codes": torch.uint8, "widths": torch.uint8, "scales": torch.float32, "levels": torch.float32}


@dataclass(frozen=True)
class Matrix(Strict):
    """One base weight's change: B is [n_out, n_directions], A is [n_directions, n_in]."""

    name: str
    n_out: int
    n_in: int
    n_directions: int
    transposed: bool = False


@dataclass(frozen=True)
class Head(Strict):
    """What `compressed.json` says.

    bits: What was asked for, a number of the original factors.
    error: Norm of what was lost over the norm of the weight change, all matrices together.
    source_hash: Content hash of the expert it was made from.
    """

    matrices: Tuple[Matrix, ...]
    bits: float
    error: float
    source_hash: str = ""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Compressed:
    """A compressed expert.

    data: "codes" [n_bytes] uint8, for each direction those of B's column and A's row as one bit string that ends with its last
        byte; "widths" [n_directions] uint8; "scales" [n_directions] float32; "levels" [2 + 4 + ... + 2 ** widest] float32.
    """

    head: Head
    data: Dict[str, Tensor]


def expand(compressed: Compressed) -> Adapter:
    """The factors of a compressed expert, float32, on the CPU."""
    place = start = 0
    widths, scales = compressed.data["widths"].tolist(), compressed.data["scales"]
    codes, tables = compressed.data["codes"].numpy(), compressed.data["levels"]
    matrices: Dict[str, LoraFactors] = {}
    for matrix in compressed.head.matrices:
        size = matrix.n_out + matrix.n_in
        both = torch.zeros((matrix.n_directions, size))
        for row in range(matrix.n_directions):
            width = widths[place + row]
            taken = n_bytes(size, width)
            table = tables[2**width - 2 :]  # the narrower tables before it have 2 + 4 + ... levels
            both[row] = table[unpack(codes[start : start + taken], size, width)]
            start += taken
        b = both[:, : matrix.n_out] * scales[place : place + matrix.n_directions, None]
        place += matrix.n_directions
        a = both[:, matrix.n_out :]
        matrices[matrix.name] = LoraFactors(a.contiguous(), b.T.contiguous(), 1.0, matrix.transposed)
    return Adapter(matrices)


def n_bytes(size: int, width: int) -> int:
    return -(-size * width // 8)


def pack(codes: Tensor, width: int) -> np.ndarray:
    """Codes below 2 ** width as one bit string, filled up to whole bytes: uint8."""
    shifts = np.arange(width - 1, -1, -1)
    return np.packbits((codes.numpy()[:, None] >> shifts & 1).astype(np.uint8))


def unpack(packed: np.ndarray, size: int, width: int) -> Tensor:
    """The reverse of `pack`: [size], int64."""
    bits = np.unpackbits(packed, count=size * width).reshape(size, width)
    return torch.from_numpy(bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1)))


def write_compressed(compressed: Compressed, folder: Path) -> None:
    """Write both files into a folder that is there."""
    save_file(compressed.data, folder / DATA_FILE)
    text = json.dumps(to_json(compressed.head), separators=(",", ":"), ensure_ascii=False)
    (folder / HEAD_FILE).write_text(text + "\n", encoding="utf8")


def is_compressed(folder: Path) -> bool:
    """Whether the expert in a folder is kept in the compressed form."""
    return (folder / HEAD_FILE).is_file()


def read_head(folder: Path, name: str) -> Head:
    """Read and check `compressed.json`.

    RAISES: SamError S104 if a file is missing, S120 if it is damaged or of another version.
    """
    for file in (HEAD_FILE, DATA_FILE):
        if not (folder / file).is_file():
            raise SamError("S104", name=name, path=folder / file)
    try:
        data = json.loads((folder / HEAD_FILE).read_text(encoding="utf8"))
    except ValueError as error:
        raise SamError("S120", name=name, problem=f"{HEAD_FILE} cannot be read ({error})") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        problem = f"{HEAD_FILE} has format version {version}; this version of spacy-sam reads {FORMAT_VERSION}"
        raise SamError("S120", name=name, problem=problem)
    try:
        head = from_json(Head, data, "S102", path=folder / HEAD_FILE)
    except SamError as error:
        raise SamError("S120", name=name, problem=f"{HEAD_FILE} is damaged ({error.fields['reason']})") from error
    bad = [m.name for m in head.matrices if min(m.n_out, m.n_in) < 1 or not 0 <= m.n_directions <= min(m.n_out, m.n_in)]
    if bad or not head.matrices:
        raise SamError("S120", name=name, problem=f"{HEAD_FILE} has no matrices, or impossible ones: {', '.join(bad)}")
    if len({m.name for m in head.matrices}) < len(head.matrices):
        raise SamError("S120", name=name, problem=f"{HEAD_FILE} names a matrix twice")
    return head


def read_compressed(folder: Path, name: str) -> Adapter:
    """Read a compressed expert's factors and check them.

    folder (Path): The expert's folder.
    name (str): The expert's name, for messages.
    RETURNS (Adapter): float32 factors on the CPU.
    RAISES: SamError S104 if a file is missing, S120 if one is damaged.
    """
    head = read_head(folder, name)
    try:
        data = load_file(folder / DATA_FILE)
    except (SafetensorError, OSError) as error:
        raise SamError("S120", name=name, problem=f"{DATA_FILE} cannot be read ({error})") from error
    for problem in _problems(head, data):
        raise SamError("S120", name=name, problem=f"{DATA_FILE} {problem}")
    return expand(Compressed(head, data))


def _problems(head: Head, data: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps the data from being expanded; nothing if it is sound."""
    if {key: tensor.dtype for key, tensor in data.items()} != DTYPES or any(t.dim() != 1 for t in data.values()):
        yield f"has other tensors than {', '.join(DTYPES)}"
        return
    widths = data["widths"].tolist()
    sizes = [matrix.n_out + matrix.n_in for matrix in head.matrices for _ in range(matrix.n_directions)]
    if len(widths) != len(sizes) or len(data["scales"]) != len(sizes):
        yield f"has {len(widths)} widths and {len(data['scales'])} scales, and {HEAD_FILE} says {len(sizes)} directions"
    elif not all(1 <= width <= MAX_WIDTH for width in widths):
        yield f"has widths outside 1 to {MAX_WIDTH}"
    elif len(data["levels"]) != 2 ** (max(widths, default=0) + 1) - 2:
        yield f"has {len(data['levels'])} levels, which is not what its widths need"
    elif len(data["codes"]) != sum(n_bytes(size, width) for size, width in zip(sizes, widths)):
        yield f"has {len(data['codes'])} bytes of codes, which is not what its widths need"
    elif not (torch.isfinite(data["scales"]).all() and torch.isfinite(data["levels"]).all()):
        yield "has NaN or infinite values"


def hash_compressed(folder: Path) -> str:
    """Content hash of a compressed expert: its data, and the matrices that it is of."""
    digest = hashlib.sha256((folder / DATA_FILE).read_bytes())
    head = json.loads((folder / HEAD_FILE).read_text(encoding="utf8"))
    digest.update(json.dumps([head["format_version"], head["matrices"]], sort_keys=True).encode("utf8"))
    return digest.hexdigest()[:16]
