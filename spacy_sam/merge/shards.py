"""Sharded safetensors, written tensor by tensor: no shard is ever in memory."""

import json
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from .base_files import INDEX_FILE, WEIGHTS_FILE

MAX_SHARD_SIZE = 5_000_000_000
ALIGNMENT = 8


class Planned(NamedTuple):
    """A tensor that will be written: `dtype` as safetensors writes it, such as "BF16"."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    n_bytes: int

    @property
    def alignment(self) -> int:
        """Bytes of one entry, for the order in the file: readers want every tensor to start at a multiple of its own."""
        n_entries = 1
        for length in self.shape:
            n_entries *= length
        return self.n_bytes // n_entries if n_entries else 0


def plan_shards(tensors: Sequence[Planned], max_size: int) -> List[List[Planned]]:
    """Divide tensors into files of at most `max_size` bytes, in order; one that is larger is alone in its file.

    tensors (Sequence[Planned]): All of them.
    max_size (int): Bytes of tensors in a file.
    RETURNS (List[List[Planned]]): The tensors of each file, as they follow each other in it.
    """
    shards: List[List[Planned]] = [[]]
    room = max_size
    for tensor in tensors:
        if shards[-1] and tensor.n_bytes > room:
            shards.append([])
            room = max_size
        shards[-1].append(tensor)
        room -= tensor.n_bytes
    return [sorted(shard, key=lambda tensor: -tensor.alignment) for shard in shards]


def write_shards(folder: Path, shards: Sequence[Sequence[Planned]], tensors: Iterator[Tensor]) -> None:
    """Write the files, and their index if there are several.

    folder (Path): Where to.
    shards (Sequence[Sequence[Planned]]): From `plan_shards`.
    tensors (Iterator[Tensor]): All tensors in the order of the shards; each is asked for when it is written.
    RAISES: OSError if the disk is full, ValueError if a tensor is not what was planned.
    """
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        write_index(folder, dict(zip(names, shards)))
    for name, shard in zip(names, shards):
        with open_file(folder / name) as file:
            file.write(_header(shard))
            for planned, tensor in zip(shard, tensors):
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                if (tuple(tensor.shape), data.nbytes) != (planned.shape, planned.n_bytes):
                    raise ValueError(f"{planned.name} is not as planned: {tuple(tensor.shape)}, {tensor.dtype}")
                file.write(data.data)


def open_file(path: Path) -> BinaryIO:
    return path.open("wb")


def write_index(folder: Path, shards: Dict[str, Sequence[Planned]]) -> None:
    """Write `model.safetensors.index.json`."""
    size = sum(tensor.n_bytes for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf8")


def _header(shard: Sequence[Planned]) -> bytes:
    entries: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        end = start + tensor.n_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf8")
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
