"""The output folder: outputs, the plan, and a manifest with a small JSON file for each finished shard.

    OUT/<key>.jsonl                    the documents of one shard
    OUT/plan.json                      the plan
    OUT/manifest/settings.json         what else decides the outputs
    OUT/manifest/shards/<key>.json     what was read, by which plan and settings, and what came of it
    OUT/manifest/problems.jsonl        malformed lines, failed documents, shards that could not be read

Every file is written beside its place and renamed, so that it is whole or not there. A shard's entry is written after its output.
"""

import errno
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, Optional, Sequence

from ..errors import SamError
from ..plan import Plan
from .shards import Shard

TEMPORARY = ".sam-tmp"
RESERVED = ("plan.json", "manifest")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when all of it is on the disk. RAISES: SamError S813 if it cannot be."""
    with _coded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield Guarded(file, path)  # type: ignore[misc]
            with _coded(path):
                file.flush()
                os.fsync(file.fileno())
        with _coded(path):
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def _coded(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SamError("S813", path=path, reason=error.strerror or error) from error


class Guarded:
    """A file whose write errors are coded, so that a full disk is not taken for an input that cannot be read."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path

    def write(self, data: Any) -> int:
        with _coded(self._path):
            return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is. Not every system lets a folder be opened for that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode("ascii"))


class OutputFolder:
    """Where a run writes, and what earlier runs have written there."""

    def __init__(self, path: Path, suffix: str) -> None:
        """suffix: Of the outputs."""
        self.path = path
        self.suffix = suffix
        self.manifest = path / "manifest"

    def output(self, key: str) -> Path:
        return self.path / (key + self.suffix)

    def entry_path(self, key: str) -> Path:
        return self.manifest / "shards" / (key + ".json")

    def check_names(self, shards: Iterable[Shard]) -> None:
        """RAISES: SamError S812 if an output would be written over an input or one of the folder's own files."""
        inputs = {str(path) for shard in shards for path in shard.paths()}
        for shard in shards:
            output = self.output(shard.key)
            if output.relative_to(self.path).parts[0] in RESERVED:
                raise SamError("S812", name=output.name, first=shard.path, second="the run itself")
            if str(output.resolve()) in inputs:
                raise SamError("S812", name=output, first=shard.path, second="an input of the run")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out while this one goes on. RAISES: SamError S818 if there is another one, S813 if it is no folder."""
        try:
            self.manifest.mkdir(parents=True, exist_ok=True)
            file = (self.manifest / ".lock").open("w")
        except OSError as error:
            raise SamError("S813", path=self.path, reason=error.strerror or error) from error
        with file:
            _lock(file, self.path)
            self._clean()
            yield

    def _clean(self) -> None:
        """Remove what killed runs left half-written."""
        for path in self.path.rglob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)

    def plan(self) -> Optional[Plan]:
        path = self.path / "plan.json"
        return Plan.from_disk(path) if path.is_file() else None

    def write_plan(self, plan: Plan) -> None:
        with whole_file(self.path / "plan.json") as file:
            file.write((json.dumps(plan.to_dict(), indent=2, ensure_ascii=False) + "\n").encode("utf8"))

    def settings(self) -> Optional[Dict[str, Any]]:
        return _read_json(self.manifest / "settings.json")

    def write_settings(self, settings: Dict[str, Any]) -> None:
        write_json(self.manifest / "settings.json", settings)

    def entry(self, key: str) -> Optional[Dict[str, Any]]:
        """What is known of a shard's output; None if there is none, or not as it was written."""
        entry = _read_json(self.entry_path(key))
        try:
            whole = entry is not None and self._recorded(key, entry).stat().st_size == entry["output_bytes"]
        except (OSError, KeyError):
            return None
        return entry if whole else None

    def _recorded(self, key: str, entry: Dict[str, Any]) -> Path:
        """A shard's output, which another format may have made, with another suffix."""
        name = str(entry.get("output"))
        ours = name.startswith(key) and "/" not in name[len(key) :]
        return self.path / name if ours else self.output(key)

    def keys(self) -> List[str]:
        """Keys of all shards that have an entry."""
        root = self.manifest / "shards"
        return sorted(path.relative_to(root).as_posix()[: -len(".json")] for path in root.rglob("*.json"))

    def remove(self, key: str) -> None:
        """Remove a shard's output and entry, the entry last: a killed run is asked again."""
        entry = _read_json(self.entry_path(key)) or {}
        for path in (self._recorded(key, entry), self.entry_path(key)):
            path.unlink(missing_ok=True)

    def write_problems(self, problems: Sequence[Dict[str, Any]]) -> Optional[Path]:
        """Write the list of problems, or remove an old one if there are none. RETURNS (Optional[Path]): The file."""
        path = self.manifest / "problems.jsonl"
        if not problems:
            path.unlink(missing_ok=True)
            return None
        with whole_file(path) as file:
            for problem in problems:
                file.write((json.dumps(problem) + "\n").encode("ascii"))
        return path


def _lock(file: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs at once would do the same work twice, and write the same
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SamError("S818", path=path) from error
    except OSError:  # a file system without locks
        return


def _read_json(path: Path) -> Optional[Dict[str, Any]]:
    """A JSON object; None if it is not there or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
