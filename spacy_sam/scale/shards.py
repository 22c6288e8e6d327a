"""Inputs to shards: the pieces of work that are handed out, each with one output file. Knows file names, not contents."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

from ..errors import SamError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".spacy": "spacy",
    ".txt": "txt",
}
SPLITTABLE = (".jsonl", ".txt")
FILES_PER_SHARD = 1000
BLOCK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A file, a range of a file's bytes, or some text files of a folder.

    key: Its name among the shards of a run; the output is called so, with the suffix of the output format.
    path: The file; for text files, the folder.
    kind: "jsonl", "parquet", "spacy", "txt" (a text a line) or "files" (a text a file).
    part: First byte and the byte behind the last one, for a part of a file: it has the lines that begin in there.
    files: Names under `path`, for "files".
    """

    key: str
    path: str
    kind: str
    part: Optional[Tuple[int, int]] = None
    files: Tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return _suffix(Path(self.path))

    def paths(self) -> List[Path]:
        """The files it reads."""
        return [Path(self.path, name) for name in self.files] if self.files else [Path(self.path)]

    def size(self) -> int:
        """Bytes to read; 0 for what is not there."""
        if self.part:
            return self.part[1] - self.part[0]
        return sum(path.stat().st_size for path in self.paths() if path.is_file())

    def state(self) -> List[List[int]]:
        """Size and time of change of its files. RAISES: OSError if one is not there."""
        return [[s.st_size, s.st_mtime_ns] for s in (path.stat() for path in self.paths())]

    def digest(self) -> str:
        """SHA-256 of its names and bytes, in hexadecimal. RAISES: OSError if it cannot be read."""
        found = hashlib.sha256()
        for name, path in zip(self.files or ("",), self.paths()):
            found.update(f"{name}\0{path.stat().st_size if self.files else ''}\0".encode("utf8", "surrogateescape"))
            with path.open("rb") as file:
                for block in _blocks(file, self.part):
                    found.update(block)
        return found.hexdigest()


def _blocks(file: BinaryIO, part: Optional[Tuple[int, int]]) -> Iterator[bytes]:
    if part is None:
        while block := file.read(BLOCK):
            yield block
        return
    start = seek_line(file, part[0])
    file.seek(part[1])
    left = seek_line(file, part[1]) - start
    file.seek(start)
    while left > 0 and (block := file.read(min(BLOCK, left))):
        left -= len(block)
        yield block


def seek_line(file: BinaryIO, position: int) -> int:
    """Go to the first line that begins at a byte or behind it. RETURNS (int): Where it begins."""
    if position == 0:
        file.seek(0)
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()


def find_shards(
    inputs: Sequence[Path], out: Path, *, shard_size: Optional[int] = None, txt: str = "auto"
) -> List[Shard]:
    """The shards of files, folders and glob patterns, sorted by key.

    inputs (Sequence[Path]): Folders are searched at any depth for files of the known kinds; hidden ones are left out.
    out (Path): The output folder, which is not searched.
    shard_size (Optional[int]): Divide uncompressed `.jsonl` and line-wise `.txt` files that have more bytes than this.
    txt (str): "lines" (a text a line), "files" (a text a file), or "auto": files in folders, lines in files that are named.
    RAISES: SamError S810 if there is nothing to annotate, S812 if two shards have one key.
    """
    shards: Dict[str, Shard] = {}
    for shard in _all_shards(inputs, out.resolve(), shard_size, txt):
        if shard.key in shards and shard != shards[shard.key]:
            raise SamError("S812", name=shard.key, first=shards[shard.key].path, second=shard.path)
        shards[shard.key] = shard
    if not shards:
        raise SamError("S810", path=", ".join(map(str, inputs)))
    return [shards[key] for key in sorted(shards)]


def _all_shards(inputs: Iterable[Path], out: Path, shard_size: Optional[int], txt: str) -> Iterator[Shard]:
    for given in inputs:
        if given.is_dir():
            yield from _folder(given, out, shard_size, "files" if txt == "auto" else txt)
            continue
        for path in _named(given):
            yield from _file(path, path.name, shard_size, "lines" if txt == "auto" else txt)


def _named(given: Path) -> List[Path]:
    """A file, or those of a pattern. RAISES: SamError S810 for what is not there or of no known kind."""
    import glob

    found = (
        [given] if given.is_file() else [path for path in map(Path, sorted(glob.glob(str(given)))) if path.is_file()]
    )
    if not found or not all(_suffix(path) for path in found):
        raise SamError("S810", path=next((path for path in found if not _suffix(path)), given))
    return found


def _folder(folder: Path, out: Path, shard_size: Optional[int], txt: str) -> Iterator[Shard]:
    texts: List[str] = []
    for path in _walk(folder, out):
        relative = path.relative_to(folder).as_posix()
        if _suffix(path) == ".txt" and txt == "files":
            texts.append(relative)
        elif _suffix(path):
            yield from _file(path, relative, shard_size, txt)
    yield from _text_files(folder, sorted(texts))


def _walk(folder: Path, out: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(root, f).resolve() != out)
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(root, name)


def _file(path: Path, name: str, shard_size: Optional[int], txt: str) -> Iterator[Shard]:
    suffix = _suffix(path)
    absolute, stem, kind = str(path.resolve()), name[: -len(suffix)], SUFFIXES[suffix]
    if suffix == ".txt" and txt == "files":
        yield Shard(stem, str(path.resolve().parent), "files", files=(path.name,))
        return
    size = path.stat().st_size
    if shard_size is None or suffix not in SPLITTABLE or size <= shard_size:
        yield Shard(stem, absolute, kind)
        return
    for number, start in enumerate(range(0, size, shard_size)):
        yield Shard(f"{stem}.{number:05d}", absolute, kind, part=(start, min(start + shard_size, size)))


def _text_files(folder: Path, names: List[str]) -> Iterator[Shard]:
    root = folder.resolve()
    for number, start in enumerate(range(0, len(names), FILES_PER_SHARD)):
        files = tuple(names[start : start + FILES_PER_SHARD])
        yield Shard(f"{root.name or 'texts'}.txt.{number:05d}", str(root), "files", files=files)


def _suffix(path: Path) -> str:
    """The known suffix of a file's name, or nothing."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix) and path.name != suffix), "")
