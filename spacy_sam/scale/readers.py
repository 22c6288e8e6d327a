"""Shards to documents, one at a time. What is malformed is reported with its place, and reading goes on."""

import gzip
import io
import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, Optional, Tuple, Union

from ..errors import SamError
from .shards import Shard, seek_line

PARQUET_BATCH = 256
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Item:
    """One document. place: Its line, row or number in the shard, from 1, or the file's name. fields: All else it came with."""

    place: Union[int, str]
    text: str
    fields: Dict[str, Any] = field(default_factory=dict)
    doc: Any = None


@dataclass(frozen=True)
class Problem:
    """What cannot be made a document, or was not annotated, and why."""

    place: Union[int, str]
    problem: str


class UnreadableError(Exception):
    """A shard that cannot be read, or not to its end."""


Read = Union[Item, Problem]


class Reader:
    """Iterates over a shard: `Item` for a document, `Problem` for what is none.

    RAISES, while it is iterated over: UnreadableError if the file is not there, damaged, or of another kind.
    """

    def __init__(self, shard: Shard, *, text_field: str = "text", vocab: Any = None) -> None:
        """shard: What to read. text_field: Where the text is, in JSONL and Parquet. vocab: For Docs from a DocBin."""
        self.shard = shard
        self.text_field = text_field
        self.vocab = vocab
        self._raw: Optional[BinaryIO] = None

    def position(self) -> int:
        """Bytes of the shard that were read so far, where that is known."""
        if self._raw is None or self._raw.closed:
            return 0
        return self._raw.tell() - (self.shard.part[0] if self.shard.part else 0)

    def __iter__(self) -> Iterator[Read]:
        read = {
            "jsonl": self._jsonl,
            "txt": self._txt,
            "files": self._files,
            "parquet": self._parquet,
            "spacy": self._docbin,
        }[self.shard.kind]
        try:
            yield from read()
        except (SamError, UnreadableError):
            raise
        except MemoryError:
            raise
        except Exception as error:  # each format's library has errors of its own for a damaged file
            raise UnreadableError(f"{type(error).__name__}: {error}") from error

    def _jsonl(self) -> Iterator[Read]:
        for number, line in self._lines():
            if line.strip():
                yield self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> Read:
        try:
            row = json.loads(line.decode("utf8"))
        except UnicodeDecodeError as error:
            return Problem(number, f"not UTF-8 ({error.reason} at byte {error.start})")
        except (ValueError, RecursionError) as error:
            return Problem(number, f"not JSON ({error})")
        if not isinstance(row, dict):
            return Problem(number, f"not a JSON object with {self.text_field!r}")
        return self._row(number, row)

    def _row(self, number: int, row: Dict[str, Any]) -> Read:
        if self.text_field not in row:
            return Problem(number, f"no {self.text_field!r}")
        text = row.pop(self.text_field)
        if not isinstance(text, str):
            return Problem(number, f"{self.text_field!r} is not a string")
        if not _is_unicode(text):
            return Problem(number, f"{self.text_field!r} has half of a surrogate pair, which is no character")
        return Item(number, text, row)

    def _txt(self) -> Iterator[Read]:
        for number, line in self._lines():
            try:
                text = line.rstrip(b"\r\n").decode("utf8")
            except UnicodeDecodeError as error:
                yield Problem(number, f"not UTF-8 ({error.reason} at byte {error.start})")
                continue
            if text.strip():
                yield Item(number, text)

    def _lines(self) -> Iterator[Tuple[int, bytes]]:
        """Numbered lines as bytes: of the whole file, or those that begin in the shard's part of it.

        In a part, lines are counted from its own first one: `first_line` says which that is.
        """
        end = self.shard.part[1] if self.shard.part else None
        with Path(self.shard.path).open("rb") as raw:
            file = self._decompressed(raw)
            place = seek_line(file, self.shard.part[0]) if self.shard.part else 0
            number = 0
            while (end is None or place < end) and (line := file.readline()):
                number += 1
                yield number, line[3:] if place == 0 and line.startswith(BOM) else line
                place += len(line)

    def first_line(self) -> int:
        """The number, in the file, of the shard's first line. Counts lines up to there."""
        if not self.shard.part or self.shard.part[0] == 0:
            return 1
        with open(self.shard.path, "rb") as file:
            left = seek_line(file, self.shard.part[0])
            file.seek(0)
            count = 1
            while left > 0 and (block := file.read(min(1 << 20, left))):
                count += block.count(b"\n")
                left -= len(block)
        return count

    def _decompressed(self, raw: BinaryIO) -> BinaryIO:
        self._raw = raw
        if self.shard.suffix.endswith(".gz"):
            return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
        if self.shard.suffix.endswith(".zst"):
            return io.BufferedReader(_Zstd(raw), 1 << 20)
        return raw

    def _files(self) -> Iterator[Read]:
        for name, path in zip(self.shard.files, self.shard.paths()):
            try:
                data = path.read_bytes()
                text = (data[3:] if data.startswith(BOM) else data).decode("utf8")
            except UnicodeDecodeError as error:
                yield Problem(name, f"not UTF-8 ({error.reason} at byte {error.start})")
            except OSError as error:
                yield Problem(name, f"cannot be read ({error})")
            else:
                yield Item(name, text, {"file": name})

    def _parquet(self) -> Iterator[Read]:
        parquet = need("pyarrow.parquet", "pyarrow", "parquet", self.shard.path)
        with parquet.ParquetFile(self.shard.path) as file:
            if self.text_field not in file.schema_arrow.names:
                raise UnreadableError(f"no column {self.text_field!r}; there are {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield self._row(number, row)

    def _docbin(self) -> Iterator[Read]:
        from spacy.tokens import DocBin

        bin = DocBin(store_user_data=True).from_disk(self.shard.path)
        for number, doc in enumerate(bin.get_docs(self.vocab), 1):
            yield Item(number, doc.text, {}, doc)


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of any number of frames. A cut-off file is an error, not an end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._zstandard = need("zstandard", "zstandard", "zst", getattr(raw, "name", ""))
        self._raw = raw
        self._frame: Any = None
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._raw.read(1 << 17)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the Zstandard file ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def need(module: str, package: str, extra: str, path: Union[str, Path]) -> Any:
    """Import a package of an extra. RAISES: SamError S814 if it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SamError("S814", path=path, package=package, extra=extra) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf8")
    except UnicodeEncodeError:
        return False
    return True
