"""Bases on disk: their hashes and the shapes of their weights, from file headers."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from .errors import SamError

TOKENIZER_FILE = "tokenizer.json"


def hash_base(folder: Path) -> str:
    """Hash a base by its tokenizer, its safetensors headers and the first 4 KiB of every tensor.

    A retrained or reshaped base, or one with another vocabulary, has another hash, and an 8B base is hashed in well
    under a second. It is no checksum against single damaged bytes.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SamError("S503", path=folder, reason="no .safetensors file in it")
    if (folder / TOKENIZER_FILE).is_file():
        digest.update((folder / TOKENIZER_FILE).read_bytes())
    for file in files:
        with file.open("rb") as stream:
            header, start = read_header(stream, file)
            digest.update(json.dumps(header, sort_keys=True).encode("utf8"))
            for name in sorted(header):
                begin, end = header[name]["data_offsets"]
                stream.seek(start + begin)
                digest.update(stream.read(min(4096, end - begin)))
    return digest.hexdigest()[:16]


def base_shapes(folder: Path) -> Dict[str, Tuple[int, ...]]:
    """Shapes of the base's tensors, by name, from the file headers alone."""
    shapes: Dict[str, Tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header, _ = read_header(stream, file)
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})
    return shapes


def read_header(stream: Any, path: Path) -> Tuple[Dict[str, Any], int]:
    """The entries of a safetensors file that is open at its beginning, by tensor name, and where the data begins.

    RAISES: SamError S102 if it is none.
    """
    try:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size)) if size <= os.path.getsize(path) else None
        if not isinstance(header, dict):
            raise ValueError("truncated")
    except ValueError as error:
        raise SamError("S102", path=path, reason=f"not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def hub_hash(base: str, revision: Optional[str]) -> str:
    return f"{base}@{revision}"
