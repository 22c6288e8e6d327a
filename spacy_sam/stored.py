"""How experts are kept in their folders: as PEFT adapters, or compressed. What a bank needs of either."""

import shutil
from pathlib import Path
from typing import Tuple

from . import compressed as packed
from .adapters import Adapter, hash_adapter, read_adapter
from .lora_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config


def check_config(folder: Path, name: str) -> None:
    """Check an expert's config, without its weights.

    RAISES: SamError S104 to S107, S118 or S120 if it cannot be merged or is damaged.
    """
    if packed.is_compressed(folder):
        packed.read_head(folder, name)
    else:
        read_adapter_config(folder, name)


def read_factors(folder: Path, name: str) -> Adapter:
    """Read an expert's factors, whichever way they are kept. RAISES: as `check_config`."""
    return packed.read_compressed(folder, name) if packed.is_compressed(folder) else read_adapter(folder, name)


def hash_expert(folder: Path) -> str:
    """Content hash of what decides an expert's weight change. Compressed, it is another expert with another hash."""
    return packed.hash_compressed(folder) if packed.is_compressed(folder) else hash_adapter(folder)


def files_of(folder: Path) -> Tuple[str, str]:
    """The names of an expert's config and weights."""
    return (packed.HEAD_FILE, packed.DATA_FILE) if packed.is_compressed(folder) else (CONFIG_FILE, WEIGHTS_FILE)


def copy_weights(source: Path, target: Path) -> None:
    """Copy an expert's weights, and of a compressed one its head; a PEFT config is left to be written."""
    config, weights = files_of(source)
    shutil.copyfile(source / weights, target / weights)
    if packed.is_compressed(source):
        shutil.copyfile(source / config, target / config)
