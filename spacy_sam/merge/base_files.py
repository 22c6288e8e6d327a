"""A base on disk, tensor by tensor: where its files are, what is in them, and which of them a parameter is."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bases import read_header
from ..errors import SamError
from ..models import auto_model
from ..quiet import quiet_loading

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What belongs to a model beside its weights: config, generation config, tokenizer, templates, licence.
OTHER_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")


class Entry(NamedTuple):
    """One tensor as its file's header has it: `dtype` as safetensors writes it, such as "BF16"."""

    file: Path
    dtype: str
    shape: Tuple[int, ...]
    n_bytes: int


class BaseFiles:
    """The tensors of a base in safetensors files, in their order. None is read before `read`."""

    def __init__(self, source: str, revision: Optional[str] = None, local_files_only: bool = False) -> None:
        """Find the files, and read their headers.

        source (str): A folder or a hub id. What is not in the hub's local cache is downloaded.
        revision (Optional[str]): Of the hub id.
        local_files_only (bool): Never ask a hub.
        RAISES: SamError S503 if there is no such base, S411 if it has no safetensors weights, or not all of them; S102 if a
            file is damaged.
        """
        self.folder = _local_folder(source, revision, local_files_only)
        self.entries: Dict[str, Entry] = {}
        for file in self._weight_files():
            try:
                with file.open("rb") as stream:
                    header, _ = read_header(stream, file)
            except OSError as error:
                raise SamError("S411", path=self.folder, reason=error) from error
            # In the order of the data: reading goes through a file once.
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                self.entries[name] = Entry(file, entry["dtype"], tuple(entry["shape"]), end - begin)

    def _weight_files(self) -> List[Path]:
        """As transformers chooses them."""
        single, index = self.folder / WEIGHTS_FILE, self.folder / INDEX_FILE
        if single.is_file():
            return [single]
        if not index.is_file():
            others = sorted(path.name for path in self.folder.glob("*.bin"))
            reason = f"it has no '{WEIGHTS_FILE}' and no '{INDEX_FILE}'"
            if others:
                reason += (
                    f", only {', '.join(others)}. Load it with transformers and save it again (save_pretrained), which "
                    "writes safetensors"
                )
            raise SamError("S411", path=self.folder, reason=reason)
        try:
            names = json.loads(index.read_text(encoding="utf8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise SamError("S411", path=self.folder, reason=f"'{INDEX_FILE}' cannot be read ({error!r})") from error
        files = [self.folder / name for name in dict.fromkeys(names)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise SamError("S411", path=self.folder, reason=f"{', '.join(missing)} is missing")
        return files

    def read(self, name: str) -> Tensor:
        """RAISES: SamError S411 if the file cannot be read any more."""
        try:
            with safe_open(self.entries[name].file, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SamError("S411", path=self.folder, reason=error) from error

    def key_of(self, matrix: str, shape: Tuple[int, ...], prefix: str) -> str:
        """The name that a parameter has in the files: some are written without the prefix of the model's class.

        matrix (str): Name of the parameter in the model.
        shape (Tuple[int, ...]): Its shape.
        prefix (str): `base_model_prefix` of the model's class.
        RAISES: SamError S411 if it is not in the files.
        """
        for name in (matrix, matrix.removeprefix(f"{prefix}."), f"{prefix}.{matrix}"):
            if name in self.entries and self.entries[name].shape == shape:
                return name
        reason = (
            f"its files have no tensor '{matrix}' {list(shape)}, neither under that name nor with '{prefix}.' added or "
            "left out. Load it with transformers and save it again (save_pretrained)"
        )
        raise SamError("S411", path=self.folder, reason=reason)

    def other_files(self) -> List[Path]:
        """Config, tokenizer and what else belongs to the model, without weights."""
        found = {path for pattern in OTHER_FILES for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if not path.name.endswith(".index.json"))


def skeleton(folder: Path) -> Any:
    """The base's model without its weights: for names, shapes and ties of its parameters.

    RAISES: SamError S503 if transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        with quiet_loading(), torch.device("meta"):
            model = auto_model(str(folder), local_files_only=True).from_config(AutoConfig.from_pretrained(folder))
            model.tie_weights()
    except (OSError, ValueError) as error:
        raise SamError("S503", path=folder, reason=error) from error
    return model


def _local_folder(source: str, revision: Optional[str], local_files_only: bool) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = [*OTHER_FILES, "model*.safetensors"]
    try:
        found = snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
    except (OSError, ValueError) as error:  # the hub's errors are of these
        raise SamError("S503", path=source, reason=error) from error
    return Path(found)
