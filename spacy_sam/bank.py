"""The bank on disk: open, validate, list, add and remove experts. Only JSON and safetensors are read."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from .adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, hash_adapter, read_adapter, read_adapter_config
from .calibration import Calibration
from .errors import SamError
from .plan import Expert, Plan, Strict, from_json, to_json

SCHEMA_VERSION = 1
BANK_FILE, CARD_FILE, EXPERTS_DIR = "bank.json", "card.json", "experts"
TOKENIZER_FILE = "tokenizer.json"
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

    Opening reads the cards and checks every adapter's config, not its weights: `check` and `load_adapter` do that.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        """Open a bank.

        path (Union[str, Path]): The folder with `bank.json`.
        RAISES: SamError S101 to S106 if it is missing, damaged, of another version, or holds what cannot be merged, S126 if its
            calibration cannot be used.
        """
        self.path = Path(path)
        self._file = _read_bank_file(self.path)
        self._calibration = Calibration.from_decoding(self._file.decoding)
        self._cards = {name: self._read_card(name) for name in self._file.experts}

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
        base_hash = hash_base(local) if local else _hub_hash(base, revision)
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
        """Content hash of an expert's weights and config."""
        return hash_adapter(self.folder(name))

    def load_adapter(self, name: str) -> Adapter:
        """Read an expert's factors. RAISES: SamError S106 or S107 if they cannot be merged or are damaged."""
        return read_adapter(self.folder(name), name)

    def check(self) -> List[str]:
        """Validate everything, weights included.

        RETURNS (List[str]): The names of the experts checked.
        RAISES: SamError S104 to S107, S110, S403 or S503 at the first thing that is wrong.
        """
        base = Path(self.base[0])
        self.check_base()
        shapes = base_shapes(base) if base.is_dir() else None
        for name in self._cards:
            adapter = self.load_adapter(name)
            if shapes is not None:
                adapter.check_shapes(shapes, name)
        return sorted(self._cards)

    def check_base(self) -> None:
        """RAISES: SamError S110 if the base on disk is not the one the experts were trained on, S503 if it is gone."""
        base = Path(self.base[0])
        if not base.is_dir() and self.base_hash != _hub_hash(*self.base):
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

    def add(self, name: str, adapter: Union[str, Path], card: Expert) -> None:
        """Copy an adapter folder into the bank under `name`. No other expert is touched.

        name (str): Its name here.
        adapter (Union[str, Path]): A PEFT folder with safetensors weights.
        card (Expert): Its card; `card.name` is replaced by `name`.
        RAISES: SamError S109 or S114 for the name, S102 for the card, S105 to S107 or S403 if it cannot be merged.
            The bank is then unchanged.
        """
        if not NAME.fullmatch(name):
            raise SamError("S114", name=name)
        if name in self._cards or name in _read_bank_file(self.path).experts:
            raise SamError("S109", name=name)
        if card.base_hash != self.base_hash:
            raise SamError("S105", name=name, found=card.base_hash, expected=self.base_hash)
        source = Path(adapter)
        loaded = read_adapter(source, name)
        base = Path(self.base[0])
        if base.is_dir():
            loaded.check_shapes(base_shapes(base), name)
        target = self.path / EXPERTS_DIR / name
        checked = from_json(Expert, asdict(replace(card, name=name)), "S102", path=target / CARD_FILE)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".adding-", dir=target.parent))
        try:
            shutil.copyfile(source / WEIGHTS_FILE, staged / WEIGHTS_FILE)
            config = _read_json(source / CONFIG_FILE)
            write_json(staged / CONFIG_FILE, {**config, "base_model_name_or_path": self._base_from_expert()})
            write_json(staged / CARD_FILE, to_json(checked))
            if target.exists():  # left over from an add that was stopped: bank.json does not know it
                shutil.rmtree(target)
            os.replace(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._write_names(added=name)
        self._cards[name] = self._read_card(name)

    def _base_from_expert(self) -> str:
        """The base as an expert's PEFT config names it: no path of the machine it was trained on."""
        inside = (self.path / self._file.base).is_dir()
        return f"../../{self._file.base}" if inside else self._file.base

    def remove(self, name: str) -> None:
        """Remove an expert and its folder. RAISES: SamError S108 if there is none of that name."""
        folder = self.folder(name)
        self._write_names(removed=name)
        del self._cards[name]
        shutil.rmtree(folder)

    def update_card(self, card: Expert) -> None:
        """Replace the card of an expert that is in the bank.

        RAISES: SamError S108 if there is none of that name, S102 or S105 for the card. The bank is then unchanged.
        """
        file = self.folder(card.name) / CARD_FILE
        if card.base_hash != self.base_hash:
            raise SamError("S105", name=card.name, found=card.base_hash, expected=self.base_hash)
        write_json(file, to_json(from_json(Expert, asdict(card), "S102", path=file)))
        self._cards[card.name] = self._read_card(card.name)

    def _write_names(self, added: Optional[str] = None, removed: Optional[str] = None) -> None:
        file = _read_bank_file(self.path)  # again: another process may have changed the bank since it was opened
        names = {*file.experts, *filter(None, [added])} - {removed}
        self._file = replace(file, experts=tuple(sorted(names)))
        write_json(self.path / BANK_FILE, to_json(self._file))

    def _read_card(self, name: str) -> Expert:
        if not NAME.fullmatch(name):
            raise SamError("S114", name=name)
        folder = _inside(self.path, name)
        if not (folder / CARD_FILE).is_file():
            raise SamError("S104", name=name, path=folder / CARD_FILE)
        card = from_json(Expert, _read_json(folder / CARD_FILE), "S102", path=folder / CARD_FILE)
        if card.name != name:
            raise SamError("S102", path=folder / CARD_FILE, reason=f"it is the card of '{card.name}'")
        if card.base_hash != self.base_hash:
            raise SamError("S105", name=name, found=card.base_hash, expected=self.base_hash)
        read_adapter_config(folder, name)
        return card


def bundled_bank_path() -> Path:
    """The folder of the bank that comes with the package. RAISES: SamError S115 if it is not installed."""
    path = Path(__file__).parent / "bundled"
    if not (path / BANK_FILE).is_file():
        raise SamError("S115")
    return path


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
            header, start = _read_header(stream, file)
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
            header, _ = _read_header(stream, file)
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})
    return shapes


def _read_header(stream: Any, path: Path) -> Tuple[Dict[str, Any], int]:
    try:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size)) if size <= os.path.getsize(path) else None
        if not isinstance(header, dict):
            raise ValueError("truncated")
    except ValueError as error:
        raise SamError("S102", path=path, reason=f"not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _hub_hash(base: str, revision: Optional[str]) -> str:
    return f"{base}@{revision}"


def _inside(bank: Path, name: str) -> Path:
    folder = bank / EXPERTS_DIR / name
    if not folder.resolve().is_relative_to(bank.resolve()):
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
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    os.replace(staged, path)
