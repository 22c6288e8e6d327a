"""The bank on disk: open, validate, list, add and remove experts. Only JSON and safetensors are read."""

import copy
import json
import os
import re
import shutil
import tempfile
import threading
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from .adapters import Adapter
from .bases import base_shapes, hash_base, hub_hash
from .calibration import Calibration
from .errors import SamError
from .locks import ProcessLock
from .lora_config import CONFIG_FILE
from .models import model_shapes
from .plan import Expert, Plan, Strict, TaskModelSpec, from_json, from_json_text, to_json
from .stored import check_config, copy_weights, files_of, hash_expert, read_factors
from .versions import CARD_FILE, AdapterVersions, Changes, Signature, compare, signature

SCHEMA_VERSION = 1
BANK_FILE, EXPERTS_DIR = "bank.json", "experts"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class BankFile(Strict):
    """What `bank.json` says.

    base: A folder inside the bank, a path, or a hub id (with `revision`).
    decoding: How its task models are best decoded, `{"entity_bias": logits}`, and what scores mean: see
        `ExpertBank.entity_bias` and `ExpertBank.calibration`.
    """

    base: str
    base_hash: str
    prompt: Dict[str, Any]
    encoder: str
    schema_version: int = SCHEMA_VERSION
    revision: Optional[str] = None
    name: str = "bank"
    experts: Tuple[str, ...] = ()
    decoding: Dict[str, float] = field(default_factory=dict)
    details: Dict[str, Any] = field(default_factory=dict)


class ExpertBank:
    """A folder of LoRA experts that share one base and one prompt format.

    Opening reads the cards and checks every adapter's config, not its weights: `check` and `load_adapter` do that. Threads may
    use one bank at a time, and change it. What other processes change is seen by `refresh`.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        """Open a bank.

        path (Union[str, Path]): The folder with `bank.json`.
        RAISES: SamError S101 to S106 if it is missing, damaged, of another version, or holds what cannot be merged, S126 if its
            calibration cannot be used.
        """
        self.path = Path(path)
        self._lock = ProcessLock()
        self._versions = AdapterVersions(read_factors, hash_expert)
        self._fixed: Optional[Dict[str, str]] = None  # of a snapshot: the versions that were asked for
        self._file = _read_bank_file(self.path)
        self._calibration = Calibration.from_decoding(self._file.decoding)
        # Never changed in place: who reads them in another thread goes on with the ones there were.
        self._file, self._cards, self._signatures = self._read_experts(self._file)

    @classmethod
    def create(
        cls,
        path: Union[str, Path],
        *,
        base: str,
        prompt: Mapping[str, Any],
        encoder: str,
        revision: Optional[str] = None,
        name: str = "bank",
        details: Optional[Mapping[str, Any]] = None,
    ) -> "ExpertBank":
        """Write an empty bank around a base. `base` is a folder name inside `path`, a path, or a hub id.

        RAISES: SamError S117 if there is a bank already.
        """
        path = Path(path)
        if (path / BANK_FILE).exists():
            raise SamError("S117", path=path)
        path.mkdir(parents=True, exist_ok=True)
        inside = path / base
        local = next((folder for folder in (inside, Path(base)) if folder.is_dir()), None)
        base_hash = hash_base(local) if local else hub_hash(base, revision)
        file = BankFile(
            base, base_hash, dict(prompt), encoder, revision=revision, name=name, details=dict(details or {})
        )
        write_json(path / BANK_FILE, to_json(file))
        return cls(path)

    def __len__(self) -> int:
        return len(self.experts)

    def __contains__(self, name: object) -> bool:
        return name in self._cards

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    @property
    def name(self) -> str:
        return self._file.name

    @property
    def base_hash(self) -> str:
        return self._file.base_hash

    @property
    def prompt(self) -> Dict[str, Any]:
        return dict(self._file.prompt)

    @property
    def encoder(self) -> str:
        return self._file.encoder

    @property
    def details(self) -> Dict[str, Any]:
        return dict(self._file.details)

    @property
    def entity_bias(self) -> float:
        """Added to the logit of beginning an entity wherever the grammar lets one begin; see `TorchEngine`."""
        return self._file.decoding.get("entity_bias", 0.0)

    @entity_bias.setter
    def entity_bias(self, logits: float) -> None:
        self._update_decoding({"entity_bias": logits})

    @property
    def calibration(self) -> Optional[Calibration]:
        """From raw scores to probabilities, as fitted on dev sets; None if nobody has."""
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration) -> None:
        self._update_decoding(calibration.to_decoding())
        self._calibration = calibration

    def _update_decoding(self, values: Mapping[str, float]) -> None:
        with self._lock.held():
            file = _read_bank_file(self.path)  # again: another process may have changed the bank since it was opened
            self._file = replace(file, decoding={**file.decoding, **values})
            write_json(self.path / BANK_FILE, to_json(self._file))

    @property
    def base(self) -> Tuple[str, Optional[str]]:
        """Where the base is (a folder or a hub id), and its revision."""
        inside = self.path / self._file.base
        return (str(inside) if inside.is_dir() else self._file.base), self._file.revision

    @property
    def experts(self) -> List[Expert]:
        """The cards that take part in selection, by name."""
        return [card for _, card in sorted(self._cards.items()) if card.role == "expert"]

    @property
    def baselines(self) -> List[Expert]:
        """The adapters kept for comparison only, by name."""
        return [card for _, card in sorted(self._cards.items()) if card.role != "expert"]

    def __getitem__(self, name: str) -> Expert:
        """RAISES: SamError S108 if there is no such expert."""
        if name not in self._cards:
            raise SamError("S108", name=name, known=", ".join(sorted(self._cards)) or "none")
        return self._cards[name]

    def folder(self, name: str) -> Path:
        """The expert's folder. RAISES: SamError S108, or S104 if it would leave the bank."""
        self[name]
        return _inside(self.path, name)

    def adapter_hash(self, name: str) -> str:
        """Content hash of an expert's weights and config. RAISES: SamError S104 or S108 if the expert is gone."""
        if self._fixed is None:
            return self._versions.on_disk(self.folder(name), name)
        if name not in self._fixed:
            self._fixed[name] = self._versions.on_disk(self.folder(name), name)
        return self._fixed[name]

    def load_adapter(self, name: str, adapter_hash: Optional[str] = None) -> Adapter:
        """An expert's factors.

        adapter_hash (Optional[str]): The version that is wanted; it is found in memory if somebody still holds it. None for what
            the folder has.
        RAISES: SamError S106, S107 or S120 if they cannot be merged or are damaged, S413 if the bank has another version by now.
        """
        wanted = adapter_hash or (self._fixed or {}).get(name)
        if wanted is None:
            return read_factors(self.folder(name), name)
        return self._versions.load(lambda: self.folder(name), name, wanted)

    def of_versions(self, spec: TaskModelSpec) -> TaskModelSpec:
        """A task model that says the versions of its experts: these are the bank's, unless it said them already."""
        if spec.adapter_hashes:
            return spec
        return spec.of_versions({name: self.adapter_hash(name) for name in spec.experts})

    def hold(self, plan: Plan) -> Dict[str, Adapter]:
        """Read the experts of a plan into memory.

        RETURNS (Dict[str, Adapter]): By name. As long as it is kept, `load_adapter` finds these versions, whatever happens to the
            folder.
        RAISES: As `load_adapter`.
        """
        return {name: self.load_adapter(name, version) for name, version in plan.adapter_hashes.items()}

    def snapshot(self, adapter_hashes: Optional[Mapping[str, str]] = None) -> "ExpertBank":
        """The bank as it is now, which stays so when this one is changed: its cards, and each version it was once asked for.

        Adapters are still read from the folder when they are loaded, and S413 raised if they were changed by then.

        adapter_hashes (Optional[Mapping[str, str]]): Versions it shall have, by name of the expert, such as a plan's.
        """
        snapshot = copy.copy(self)
        snapshot._fixed = dict(adapter_hashes or {})
        return snapshot

    def has_moved(self, snapshot: "ExpertBank") -> bool:
        """Whether the bank was changed since the snapshot, here or on disk; it is refreshed then."""
        self.refresh()
        return self._cards is not snapshot._cards

    def refresh(self) -> Changes:
        """Read `bank.json` and the cards again, to see what other processes have changed.

        RETURNS (Changes): What is different.
        RAISES: SamError S101 to S106 as on opening, S704 if it has another base or prompt format. The bank is then as it was.
        """
        with self._lock.held():
            file = _read_bank_file(self.path)
            if _identity(file) != _identity(self._file):
                raise SamError("S704", path=self.path)
            self._file, cards, signatures = self._read_experts(file)
            changes = compare(self._cards, cards, self._signatures, signatures)
            if changes:
                self._cards, self._signatures = cards, signatures
            return changes

    def _read_experts(self, file: BankFile) -> Tuple[BankFile, Dict[str, Expert], Dict[str, Signature]]:
        """Cards and signatures of the experts. One that another process removes meanwhile is not in the file any more."""
        while True:
            try:
                cards = {name: self._read_card(name) for name in file.experts}
                return file, cards, {name: signature(_inside(self.path, name), name) for name in cards}
            except SamError:
                again = _read_bank_file(self.path)
                if again == file:
                    raise
                file = again

    def check(self) -> List[str]:
        """Validate everything, weights included.

        RETURNS (List[str]): The names of the experts checked.
        RAISES: SamError S104 to S107, S110, S403 or S503 at the first thing that is wrong.
        """
        self.check_base()
        for name in self._cards:
            self._check_shapes(self.load_adapter(name), name)
        return sorted(self._cards)

    def _check_shapes(self, adapter: Adapter, name: str) -> None:
        """Of a base that is a folder; one on a hub is not asked for."""
        base = Path(self.base[0])
        if not base.is_dir():
            return
        shapes = base_shapes(base)
        if not adapter.matrices.keys() <= shapes.keys():  # some files name weights otherwise than the model does (gpt2)
            shapes.update(model_shapes(str(base)))
        adapter.check_shapes(shapes, name, either_way=True)

    def check_base(self) -> None:
        """RAISES: SamError S110 if the base on disk is not the one the experts were trained on, S503 if it is gone."""
        base = Path(self.base[0])
        if not base.is_dir() and self.base_hash != hub_hash(*self.base):
            raise SamError("S503", path=base, reason="there is no such folder")
        if base.is_dir():
            found = hash_base(base)
            if found != self.base_hash:
                raise SamError("S110", path=self.path, found=found, expected=self.base_hash)

    def check_plan(self, plan: Plan) -> None:
        """RAISES: SamError S112 if a plan is for another base, S108 or S116 if its experts are gone or were changed."""
        if plan.base_hash != self.base_hash:
            raise SamError("S112", found=plan.base_hash, expected=self.base_hash)
        for name, known in plan.adapter_hashes.items():
            if self.adapter_hash(name) != known:
                raise SamError("S116", name=name)

    def read_card(self, folder: Path, name: str) -> Expert:
        """The card of an expert that may become one of this bank. RAISES: SamError S104 without one, S102 if it is damaged."""
        file = folder / CARD_FILE
        if not file.is_file():
            raise SamError("S104", name=name, path=file)
        try:
            text = file.read_bytes()
        except OSError as error:
            raise SamError("S102", path=file, reason=error) from error
        return from_json_text(Expert, text, "S102", path=file)

    def check_new_name(self, name: str) -> None:
        """RAISES: SamError S114 for a name that no expert can have, S109 for one that an expert has."""
        if not NAME.fullmatch(name):
            raise SamError("S114", name=name)
        if name in self._cards or name in _read_bank_file(self.path).experts:
            raise SamError("S109", name=name)

    def add(self, name: str, adapter: Union[str, Path], card: Expert) -> None:
        """Copy an adapter folder into the bank under `name`. No other expert is touched.

        name (str): Its name here.
        adapter (Union[str, Path]): A PEFT folder with safetensors weights, or a compressed expert.
        card (Expert): Its card; `card.name` is replaced by `name`.
        RAISES: SamError S109 or S114 for the name, S102 for the card, S105 to S107, S118, S120 or S403 if it cannot be merged.
            The bank is then unchanged.
        """
        self.check_new_name(name)
        if card.base_hash != self.base_hash:
            raise SamError("S105", name=name, found=card.base_hash, expected=self.base_hash)
        with self._lock.held():
            self._add(name, Path(adapter), card)

    def _add(self, name: str, source: Path, card: Expert) -> None:
        self._check_shapes(read_factors(source, name), name)
        target = self.path / EXPERTS_DIR / name
        checked = from_json(Expert, asdict(replace(card, name=name)), "S102", path=target / CARD_FILE)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".adding-", dir=target.parent))
        try:
            copy_weights(source, staged)
            if CONFIG_FILE in files_of(source):
                config = _read_json(source / CONFIG_FILE)
                write_json(staged / CONFIG_FILE, {**config, "base_model_name_or_path": self._base_from_expert()})
            write_json(staged / CARD_FILE, to_json(checked))
            if target.exists():  # left over from an add that was stopped: bank.json does not know it
                shutil.rmtree(target)
            os.replace(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._write_names(added=name)
        self._put(name)

    def _put(self, name: str) -> None:
        """Take over an expert as it is on disk."""
        card = self._read_card(name)
        self._signatures = {**self._signatures, name: signature(_inside(self.path, name), name)}
        self._cards = {**self._cards, name: card}

    def _base_from_expert(self) -> str:
        """The base as an expert's PEFT config names it: no path of the machine it was trained on."""
        inside = (self.path / self._file.base).is_dir()
        return f"../../{self._file.base}" if inside else self._file.base

    def remove(self, name: str) -> None:
        """Remove an expert and its folder. RAISES: SamError S108 if there is none of that name."""
        with self._lock.held():
            folder = self.folder(name)
            self._write_names(removed=name)
            self._cards = {other: card for other, card in self._cards.items() if other != name}
            if folder.exists():  # another process may have removed it
                shutil.rmtree(folder)

    def update_card(self, card: Expert) -> None:
        """Replace the card of an expert that is in the bank.

        RAISES: SamError S108 if there is none of that name, S102 or S105 for the card. The bank is then unchanged.
        """
        file = self.folder(card.name) / CARD_FILE
        if card.base_hash != self.base_hash:
            raise SamError("S105", name=card.name, found=card.base_hash, expected=self.base_hash)
        with self._lock.held():
            write_json(file, to_json(from_json(Expert, asdict(card), "S102", path=file)))
            self._put(card.name)

    def _write_names(self, added: Optional[str] = None, removed: Optional[str] = None) -> None:
        file = _read_bank_file(self.path)  # again: another process may have changed the bank since it was opened
        names = {*file.experts, *filter(None, [added])} - {removed}
        self._file = replace(file, experts=tuple(sorted(names)))
        write_json(self.path / BANK_FILE, to_json(self._file))

    def _read_card(self, name: str) -> Expert:
        if not NAME.fullmatch(name):
            raise SamError("S114", name=name)
        folder = _inside(self.path, name)
        card = self.read_card(folder, name)
        if card.name != name:
            raise SamError("S102", path=folder / CARD_FILE, reason=f"it is the card of '{card.name}'")
        if card.base_hash != self.base_hash:
            raise SamError("S105", name=name, found=card.base_hash, expected=self.base_hash)
        check_config(folder, name)
        return card


def _identity(file: BankFile) -> Tuple[Any, ...]:
    """What pipelines load once."""
    return file.base, file.base_hash, file.revision, file.prompt, file.encoder


def bundled_bank_path() -> Path:
    """The folder of the bank that comes with the package. RAISES: SamError S115 if it is not installed."""
    path = Path(__file__).parent / "bundled"
    if not (path / BANK_FILE).is_file():
        raise SamError("S115")
    return path


def _inside(bank: Path, name: str) -> Path:
    folder = bank / EXPERTS_DIR / name
    linked = any(map(os.path.islink, (folder, folder.parent)))  # else it is inside: a name has no separators
    if linked and not folder.resolve().is_relative_to(bank.resolve()):
        raise SamError("S104", name=name, path=folder)
    return folder


def _read_bank_file(path: Path) -> BankFile:
    file = path / BANK_FILE
    if not file.is_file():
        raise SamError("S101", path=path)
    data = _read_json(file)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SamError("S103", path=path, found=version, known=SCHEMA_VERSION)
    bank = from_json(BankFile, data, "S102", path=file)
    if len(set(bank.experts)) != len(bank.experts):
        raise SamError("S102", path=file, reason="it names an expert twice")
    return bank


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise SamError("S102", path=path, reason=error) from error
    if not isinstance(data, dict):
        raise SamError("S102", path=path, reason="not a JSON object")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    staged = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    staged.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    os.replace(staged, path)
