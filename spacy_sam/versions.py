"""Versions of experts: content hashes of the adapters on disk, the ones that are in memory, and what a bank's changes are."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, NamedTuple, Tuple
from weakref import WeakValueDictionary

from .adapters import Adapter
from .errors import SamError
from .plan import Expert

SETTLED = 2_000_000_000  # nanoseconds: a file that was written just now may be written again with the same times
CARD_FILE = "card.json"


class FileState(NamedTuple):
    """What changes with a file's content: its times in nanoseconds, its number and its size in bytes."""

    name: str
    modified: int
    changed: int
    number: int
    size: int


Signature = Tuple[FileState, ...]


class Changes(NamedTuple):
    """Names of experts that were added to a bank, removed from it, and that have another card or adapter."""

    added: Tuple[str, ...] = ()
    removed: Tuple[str, ...] = ()
    changed: Tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(self[:])


class AdapterVersions:
    """Hashes the adapters of a bank, each once, and finds those that somebody has in memory.

    Adapters are kept by weak references: a version is in memory as long as somebody holds what `load` gave.
    """

    def __init__(self, read: Callable[[Path, str], Adapter], hash_folder: Callable[[Path], str]) -> None:
        """read: Of a folder and the expert's name, its factors. hash_folder: Of a folder, its content hash."""
        self._read = read
        self._hash_folder = hash_folder
        self._hashes: Dict[Path, Tuple[Signature, str]] = {}
        self._held: WeakValueDictionary[str, Adapter] = WeakValueDictionary()

    def __reduce__(self) -> Tuple[Any, ...]:
        """Another process reads for itself."""
        return AdapterVersions, (self._read, self._hash_folder)

    def on_disk(self, folder: Path, name: str) -> str:
        """Content hash of an adapter folder. It is read again when its files were changed.

        RAISES: SamError S104 or S107 if files are missing or damaged.
        """
        found = signature(folder, name)
        known = self._hashes.get(folder)
        if known is not None and known[0] == found:
            return known[1]
        try:
            adapter_hash = self._hash_folder(folder)
        except OSError as error:
            raise SamError("S104", name=name, path=folder) from error
        except ValueError as error:
            raise SamError("S107", name=name, problem=f"its config cannot be read ({error})") from error
        if time.time_ns() - max((max(file.modified, file.changed) for file in found), default=0) > SETTLED:
            self._hashes[folder] = found, adapter_hash
        return adapter_hash

    def load(self, folder: Callable[[], Path], name: str, adapter_hash: str) -> Adapter:
        """A version of an expert, from memory or else from its folder.

        folder (Callable): Finds the folder; asked if the version is not in memory.
        name (str): The expert, for messages.
        adapter_hash (str): The version.
        RAISES: SamError S413 if the version is in neither, S107 if the files are damaged.
        """
        held = self._held.get(adapter_hash)
        if held is not None:
            return held
        try:
            adapter, found = self._load_version(folder(), name)
        except SamError as error:
            if error.code not in ("S104", "S108"):
                raise
            raise SamError("S413", name=name, version=adapter_hash, reason="it was removed from the bank") from error
        if found != adapter_hash:
            raise SamError("S413", name=name, version=adapter_hash, reason=f"the bank holds version {found} now")
        return self._held.setdefault(adapter_hash, adapter)

    def _load_version(self, folder: Path, name: str) -> Tuple[Adapter, str]:
        """Factors and their hash: again, if the files were changed meanwhile."""
        while True:
            before = signature(folder, name)
            adapter_hash = self.on_disk(folder, name)
            try:
                adapter = _copied(self._read(folder, name))
            except SamError:
                if signature(folder, name) == before:
                    raise
                continue
            if signature(folder, name) == before:
                return adapter, adapter_hash


def signature(folder: Path, name: str) -> Signature:
    """The state of an adapter's files. RAISES: SamError S104 if they are not there."""
    try:
        files = sorted(path for path in folder.iterdir() if path.name != CARD_FILE and not path.name.startswith("."))
        stats = [(path.name, path.stat()) for path in files]
    except OSError as error:
        raise SamError("S104", name=name, path=folder) from error
    return tuple(FileState(n, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size) for n, stat in stats)


def compare(
    before: Mapping[str, Expert],
    after: Mapping[str, Expert],
    signatures_before: Mapping[str, Signature],
    signatures_after: Mapping[str, Signature],
) -> Changes:
    """What is different between two states of a bank: cards and signatures by name."""
    both = sorted(set(before) & set(after))
    changed = (
        name for name in both if (before[name], signatures_before[name]) != (after[name], signatures_after[name])
    )
    added, removed = set(after) - set(before), set(before) - set(after)
    return Changes(tuple(sorted(added)), tuple(sorted(removed)), tuple(changed))


def _copied(adapter: Adapter) -> Adapter:
    """Factors that are no map of a file: they stay as they are when it is written to."""
    return Adapter({key: replace(each, a=each.a.clone(), b=each.b.clone()) for key, each in adapter.matrices.items()})
