"""Caches of merged weights, bounded in bytes: in memory, and in a folder that several processes may use at a time."""

import json
import logging
import os
import re
import time
import zlib
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple
from uuid import uuid4

import torch
from torch import Tensor

from ..errors import SamError

logger = logging.getLogger("spacy_sam")
Weights = Iterable[Tuple[str, Tensor]]  # names of the base's weights, and what they are replaced by
SUFFIX, STAGED = ".safetensors", ".writing-"
NAME = re.compile(rf"[0-9a-f]{{16}}{re.escape(SUFFIX)}")
ABANDONED = 3600  # seconds without a write after which a file that is not finished never will be
CHECKSUMS = "crc32"  # in the file's metadata: of each weight, eight hex digits, in the order of the header
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


class MemoryCache:
    """Merged weights in memory. Those used longest ago go first."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: Of all weights together. Weights that do not fit alone are not kept."""
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def n_bytes(self) -> int:
        return sum(weight.nbytes for weights in self._kept.values() for weight in weights.values())

    def get(self, key: str) -> Optional[Dict[str, Tensor]]:
        """What was kept under a key: not to be changed."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: str, n_bytes: int, weights: Weights) -> Iterator[Tuple[str, Tensor]]:
        """Pass weights on, and keep them when all have come, if there is memory for them.

        n_bytes (int): Of all of them; room is made at the first one.
        """
        fits = self._make_room(n_bytes)
        merged: Dict[str, Tensor] = {}
        for matrix, weight in weights:
            if fits:
                merged[matrix] = weight
            yield matrix, weight
        if fits:
            self._kept[key] = merged

    def _make_room(self, n_bytes: int) -> bool:
        """Drop what was used longest ago until `n_bytes` more fit; drop nothing if they never can."""
        if n_bytes > self.max_bytes:
            return False
        while n_bytes + self.n_bytes > self.max_bytes:
            self._kept.popitem(last=False)
        return True


class Damaged(Exception):
    """A file of merged weights is not what was written."""


class MergedCache:
    """Merged weights as safetensors files in a folder, each named after everything that decides its weights.

    Files are written beside and renamed, and never changed: a file with a task model's name is whole, and one that is being read
    stays readable when another process removes or replaces it. A file that is gone or damaged is merged anew.
    """

    def __init__(self, folder: Path, max_bytes: int, base: str) -> None:
        """Make the folder if it is not there.

        folder (Path): The cache. Banks and processes may share it.
        max_bytes (int): Of all files together; those used longest ago are removed. A task model that does not fit alone is not
            kept.
        base (str): What identifies the base's weights.
        RAISES: SamError S414 if the folder cannot be made or written to.
        """
        self.folder = folder
        self.max_bytes = max_bytes
        self.base = base
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SamError("S414", path=folder, reason=error) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SamError("S414", path=folder, reason="it cannot be written to")

    def open(self, name: str, parameters: Mapping[str, Tensor]) -> Optional["StoredWeights"]:
        """What is kept under a name, and mark it as used; None if there is nothing.

        name (str): 16 hex digits.
        parameters (Mapping[str, Tensor]): The model's, which the weights are for. A file that does not fit them is removed.
        RETURNS (Optional[StoredWeights]): To be closed.
        """
        path = self._path(name)
        try:
            stored = StoredWeights(path, parameters)
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            self.discard(name, error)
            return None
        with suppress(OSError):  # another process has removed it: it can be read all the same
            os.utime(path)
        return stored

    def discard(self, name: str, reason: object) -> None:
        """Remove a damaged file."""
        logger.warning("Merged weights %s are damaged (%s): merging again", self._path(name), reason)
        _remove(self._path(name))

    def keep(self, name: str, layout: Mapping[str, Tensor], weights: Weights) -> Iterator[Tuple[str, Tensor]]:
        """Pass weights on, and write them; when all have come, they are in the cache.

        A disk that is full is no reason to stop: the weights are then passed on alone, with a warning.

        name (str): 16 hex digits.
        layout (Mapping[str, Tensor]): Tensors of the shapes and dtypes that will come, by name.
        """
        size = sum(tensor.nbytes for tensor in layout.values())
        if size > self.max_bytes:
            yield from weights
            return
        self._make_room(size)
        writer = _Writer(self.folder, layout)
        try:
            for matrix, weight in weights:
                writer.put(matrix, weight)
                yield matrix, weight
            writer.finish(self._path(name))
        finally:
            writer.close()
        self._make_room(0)  # another process may have written meanwhile

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _make_room(self, n_bytes: int) -> None:
        """Remove what was used longest ago until `n_bytes` more fit, and what a process that ended left half-written."""
        files: List[Tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                stat = path.stat()
            except OSError:  # another process was quicker
                continue
            if NAME.fullmatch(path.name):
                files.append((stat.st_mtime, stat.st_size, path))
            elif path.name.startswith(STAGED) and time.time() - stat.st_mtime > ABANDONED:
                _remove(path)
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + n_bytes <= self.max_bytes:
                return
            _remove(path)
            total -= size


class StoredWeights:
    """One file of merged weights, read one weight at a time. It is opened once: what happens to its name then does not matter."""

    def __init__(self, path: Path, parameters: Mapping[str, Tensor]) -> None:
        """Read the header. RAISES: FileNotFoundError, Damaged if it is damaged or does not fit the model's parameters."""
        self._stream = path.open("rb")
        try:
            self._start, header = _read_header(self._stream)
            checksums = header.pop("__metadata__")[CHECKSUMS]
            if len(checksums) != 8 * len(header):
                raise Damaged("weights or checksums are missing")
            places = range(0, len(checksums), 8)
            self._checksums = {matrix: checksums[at : at + 8] for matrix, at in zip(sorted(header), places)}
            self._offsets = {matrix: _begin(matrix, entry, parameters.get(matrix)) for matrix, entry in header.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.close()
            raise Damaged(f"its header cannot be read: {error!r}") from error
        except BaseException:
            self.close()
            raise
        self._like = {matrix: parameters[matrix] for matrix in header}
        self.matrices = list(header)
        self.n_bytes = sum(parameter.nbytes for parameter in self._like.values())

    def close(self) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Tuple[str, Tensor]]:
        """Names and weights, on the CPU. RAISES: Damaged at a weight that is not what was written."""
        for matrix, parameter in self._like.items():
            content = bytearray(parameter.nbytes)
            try:
                self._stream.seek(self._start + self._offsets[matrix])
                self._stream.readinto(content)
            except OSError as error:
                raise Damaged(error) from error
            if _checksum(content) != self._checksums[matrix]:
                raise Damaged(f"'{matrix}' has another checksum")
            yield matrix, torch.frombuffer(content, dtype=parameter.dtype).reshape(parameter.shape)


def _read_header(stream: IO[bytes]) -> Tuple[int, Dict[str, Any]]:
    """Where the weights begin, and the header before them. RAISES: ValueError."""
    size = int.from_bytes(stream.read(8), "little")
    if size > os.fstat(stream.fileno()).st_size:
        raise ValueError("it is too short")
    return 8 + size, json.loads(stream.read(size))


def _begin(matrix: str, entry: Dict[str, Any], parameter: Optional[Tensor]) -> int:
    """Where a weight begins. RAISES: Damaged if it does not fit the model's."""
    begin, end = entry["data_offsets"]
    found = entry["dtype"], entry["shape"], end - begin
    is_place = isinstance(begin, int) and begin >= 0
    fits = parameter is not None and found == (DTYPES.get(parameter.dtype), list(parameter.shape), parameter.nbytes)
    if not (is_place and fits):
        raise Damaged(f"'{matrix}' does not fit the base")
    return begin


class _Writer:
    """Writes a safetensors file, weight by weight as they come, so that no second copy of them is in memory."""

    def __init__(self, folder: Path, layout: Mapping[str, Tensor]) -> None:
        # Larger elements first: each weight then begins at a multiple of its element's size.
        order = sorted(layout, key=lambda matrix: (-layout[matrix].element_size(), matrix))
        self._header: Dict[str, Any] = {}
        self._offsets: Dict[str, int] = {}
        end = 0
        for matrix in order:
            begin, end = end, end + layout[matrix].nbytes
            shape, dtype = list(layout[matrix].shape), DTYPES[layout[matrix].dtype]
            self._header[matrix] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            self._offsets[matrix] = begin
        self._checksums = dict.fromkeys(sorted(layout), "0" * 8)
        self._start = len(self._head())
        self._failed = False
        self._path: Optional[Path] = None
        self._file: Optional[IO[bytes]] = None
        with self._warning():
            self._path = folder / f"{STAGED}{uuid4().hex}"
            self._file = self._path.open("xb")

    def put(self, matrix: str, weight: Tensor) -> None:
        if self._file is None:
            return
        content = _content(weight)
        self._checksums[matrix] = _checksum(content)
        with self._warning():
            self._file.seek(self._start + self._offsets[matrix])
            self._file.write(content)

    def finish(self, path: Path) -> None:
        """Put the header before the weights, and give the file its name."""
        if self._file is None or self._path is None:
            return
        with self._warning():
            self._file.seek(0)
            self._file.write(self._head())
            self._file.close()
            os.replace(self._path, path)
            self._path = self._file = None

    def close(self) -> None:
        """Remove what is not finished."""
        if self._file is not None:
            with suppress(OSError):  # a full disk, again
                self._file.close()
        if self._path is not None:
            _remove(self._path)
        self._path = self._file = None

    def _head(self) -> bytes:
        metadata = {CHECKSUMS: "".join(self._checksums.values())}
        text = json.dumps({"__metadata__": metadata, **self._header}).encode("utf8")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """When the disk fails, warn and write no more."""
        try:
            yield
        except OSError as error:
            logger.warning("Merged weights cannot be kept on disk (%s)", error)
            self.close()


def _content(weight: Tensor) -> Any:
    """The bytes of a weight."""
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _checksum(content: Any) -> str:
    return f"{zlib.crc32(content):08x}"


def _remove(path: Path) -> None:
    """Remove a file that another process may have removed, or have open on a system that then keeps it."""
    with suppress(OSError):
        path.unlink()
