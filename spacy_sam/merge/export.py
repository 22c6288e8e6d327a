"""Task models as plain model folders, for transformers, vLLM and others: written tensor by tensor, and whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor

from ..adapters import Adapter
from ..bank import ExpertBank
from ..errors import SamError
from ..plan import Plan, TaskModelSpec
from .base_files import BaseFiles, skeleton
from .factors import Method
from .materialise import fit
from .merged import merged_weights
from .methods import Mean
from .model_card import model_card
from .shards import MAX_SHARD_SIZE, Planned, plan_shards, write_shards
from .streaming import changed_matrices

PLAN_FILE, CARD_FILE, CONFIG_FILE = "plan.json", "README.md", "config.json"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
Resolve = Callable[[Dict[str, Any]], Method]


def write_task_models(
    bank: ExpertBank,
    plan: Plan,
    out: Path,
    resolve: Resolve,
    max_shard_size: int = MAX_SHARD_SIZE,
    dtype: Optional[torch.dtype] = None,
) -> Iterator[Tuple[Path, TaskModelSpec]]:
    """Write every task model of a plan; see `write_task_model`.

    bank (ExpertBank): The bank the plan was made for.
    plan (Plan): The plan.
    out (Path): Gets a folder `task_model_1`, `task_model_2`, ... for each, in place of what had that name, and the plan.
    YIELDS (Tuple[Path, TaskModelSpec]): Each folder when it is written.
    RAISES: SamError S108, S112 or S116 if the plan is for another bank, or for other versions of its experts, and what
        `write_task_model` raises.
    """
    bank.check_plan(plan)
    for number, spec in enumerate(plan.task_models, 1):
        folder = out / f"task_model_{number}"
        hashes = {name: bank.adapter_hash(name) for name in spec.experts}
        single = replace(plan, task_models=(spec,), adapter_hashes=hashes)
        write_task_model(bank, single, folder, resolve, max_shard_size, dtype)
        yield folder, spec
    with _disk_errors(out / PLAN_FILE):
        plan.to_disk(out / PLAN_FILE)


def write_task_model(
    bank: ExpertBank,
    plan: Plan,
    folder: Path,
    resolve: Resolve,
    max_shard_size: int = MAX_SHARD_SIZE,
    dtype: Optional[torch.dtype] = None,
    keep_existing: bool = False,
) -> None:
    """Write base + merged task vector as a model folder: the weights that `WeightSwitch` puts into a model of that dtype.

    The base is read, and the result written, tensor by tensor: one of each is in memory at a time, beside the experts'
    factors. The folder appears when all is written.

    bank (ExpertBank): The bank the plan was made for.
    plan (Plan): A plan of one task model.
    folder (Path): Gets weights in safetensors, the base's config, tokenizer and licence files, a model card and the plan.
    resolve (Callable): Makes the merge method of a task model's config block.
    max_shard_size (int): Bytes of weights in a file; one tensor can be more.
    dtype (Optional[torch.dtype]): Of all floating weights; None for what each of them has in the base.
    keep_existing (bool): If another process wrote the folder meanwhile, leave it. Else what was there is replaced.
    RAISES: SamError S411 or S503 if the base cannot be read tensor by tensor, S110 if it was changed, S403, S404, S405 or
        S107 if an expert does not fit it, S410 if a sum is too large for its dtype, S412 if the disk is full or not
        writable. Nothing is then left, and what was there before stays.
    """
    (spec,) = plan.task_models
    base = BaseFiles(*bank.base)
    bank.check_base()
    model = skeleton(base.folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    adapters = {name: fit(model, bank.load_adapter(name), name) for name in spec.experts}
    keys = {
        base.key_of(matrix, tuple(parameters[matrix].shape), model.base_model_prefix): matrix
        for matrix in changed_matrices(adapters.values())
    }
    _check_dtypes(base, keys, adapters)
    method = resolve(spec.method) if len(adapters) > 1 else Mean()
    shards = plan_shards([_planned(base, key, dtype) for key in base.entries], max_shard_size)
    order = [tensor.name for shard in shards for tensor in shard]
    by_matrix = {matrix: key for key, matrix in keys.items()}
    merged = merged_weights(
        adapters,
        spec,
        method,
        lambda matrix: _read(base, by_matrix[matrix], dtype),
        [keys[key] for key in order if key in keys],
    )
    n_bytes = sum(tensor.n_bytes for shard in shards for tensor in shard)
    with closing(merged), _staged(folder, n_bytes, keep_existing) as staging:
        for path in base.other_files():
            shutil.copyfile(path, staging / path.name)
        if dtype is not None:
            _set_dtype(staging / CONFIG_FILE, dtype)
        plan.to_disk(staging / PLAN_FILE)
        (staging / CARD_FILE).write_text(model_card(bank, plan), encoding="utf8")
        tensors = (next(merged)[1] if key in keys else _read(base, key, dtype) for key in order)
        write_shards(staging, shards, tensors)


@contextmanager
def _staged(folder: Path, n_bytes: int, keep_existing: bool) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, and is gone after an error.

    RAISES: SamError S412 in place of every OSError, and if the disk has not `n_bytes` left.
    """
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < n_bytes:
            raise OSError(f"{n_bytes / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent, ignore_cleanup_errors=True) as holder:
            staging = Path(holder) / "new"
            staging.mkdir()  # with usual rights: the one around it is its owner's alone
            yield staging
            _put_in_place(staging, folder, Path(holder) / "old", keep_existing)


def _put_in_place(staging: Path, folder: Path, old: Path, keep_existing: bool) -> None:
    if folder.exists() and not keep_existing:
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except OSError:
        if keep_existing and folder.is_dir():
            return
        if old.exists():
            os.replace(old, folder)
        raise


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SamError("S412", path=path, reason=error) from error


def _read(base: BaseFiles, key: str, dtype: Optional[torch.dtype]) -> Tensor:
    tensor = base.read(key)
    return tensor if dtype is None or tensor.dtype not in NAMES else tensor.to(dtype)


def _planned(base: BaseFiles, key: str, dtype: Optional[torch.dtype]) -> Planned:
    entry = base.entries[key]
    if dtype is None or entry.dtype not in FLOATS:
        return Planned(key, entry.dtype, entry.shape, entry.n_bytes)
    return Planned(key, NAMES[dtype], entry.shape, math.prod(entry.shape) * dtype.itemsize)


def _check_dtypes(base: BaseFiles, keys: Dict[str, str], adapters: Dict[str, Adapter]) -> None:
    """RAISES: SamError S405 if the files keep a weight that changes in another type than a float."""
    for key, matrix in keys.items():
        if base.entries[key].dtype not in FLOATS:
            expert = next(name for name, adapter in adapters.items() if matrix in adapter.matrices)
            raise SamError("S405", expert=expert, matrix=matrix, dtype=base.entries[key].dtype)


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    data = json.loads(config.read_text(encoding="utf8"))
    data.pop("torch_dtype", None)  # of older transformers
    data["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
