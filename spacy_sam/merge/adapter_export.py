"""Task models as PEFT adapters, for merges whose weight change has exact low-rank factors."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapters import KEY_PREFIX, LoraFactors
from ..bank import ExpertBank, write_json
from ..bases import base_shapes
from ..errors import SamError
from ..lora_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from ..plan import Plan, TaskModelSpec
from .adapter_card import adapter_card
from .factors import Method
from .merged import merged_factors
from .methods import Mean

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank
COPIED = ("task_type", "auto_mapping")  # settings of the experts that say what kind of model the base is


def write_task_adapters(
    bank: ExpertBank, plan: Plan, out: Path, resolve: Callable[[Dict[str, Any]], Method], pad_rank: bool = False
) -> List[Tuple[Path, TaskModelSpec]]:
    """Write each task model of a plan as a PEFT adapter of the bank's base: base + adapter is the task model, exactly.

    All of it is written beside `out` and renamed, so that an error leaves nothing behind.

    bank (ExpertBank): The bank the plan was made for.
    plan (Plan): The plan.
    out (Path): Gets a folder `task_model_1`, `task_model_2`, ... with the adapter and its card, and the plan as `plan.json`.
    resolve (Callable): Makes the merge method of a task model's config block.
    pad_rank (bool): Fill the rank up to a step of `VLLM_RANKS`.
    RETURNS (List[Tuple[Path, TaskModelSpec]]): The folders.
    RAISES: SamError S123 if there is something at `out`; S406 if a merge method's changes are not of low rank, S803 if a
        task model has none or is of too large a rank; S108, S112 or S116 if the plan is for another bank; and what
        reading and merging the experts raises.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SamError("S123", path=out)
    bank.check_plan(plan)
    for number, spec in enumerate(plan.task_models, 1):
        if not spec.experts:
            raise SamError("S803", number=number, name=spec.name, reason="it is the base itself, without a change")
    adapters = {name: bank.load_adapter(name) for spec in plan.task_models for name in spec.experts}
    # Made first: a method that makes no factors is refused before any merging.
    merges = [
        merged_factors(adapters, spec, resolve(spec.method) if len(spec.experts) > 1 else Mean())
        for spec in plan.task_models
    ]
    written = []
    with _staged(out) as staged:
        plan.to_disk(staged / "plan.json")
        for number, (spec, merge) in enumerate(zip(plan.task_models, merges), 1):
            factors = dict(merge)
            rank = _rank(factors, number, spec, pad_rank)
            folder = staged / f"task_model_{number}"
            write_adapter(folder, factors, rank, _settings(bank, spec, factors))
            (folder / "README.md").write_text(
                adapter_card(bank, plan, spec, factors, rank, VLLM_RANKS), encoding="utf8"
            )
            written.append((out / folder.name, spec))
    return written


def write_adapter(
    folder: Path, factors: Mapping[str, LoraFactors], rank: int, settings: Optional[Mapping[str, Any]] = None
) -> None:
    """Write factors as a PEFT adapter of one rank and scale 1, in float32. Lower ranks are filled up with zeros: exact.

    folder (Path): Gets `adapter_config.json` and `adapter_model.safetensors`.
    factors (Mapping[str, LoraFactors]): By the name of the base's weight, of ranks up to `rank`; all of one layout.
    rank (int): Of the adapter, at least 1.
    settings (Optional[Mapping[str, Any]]): More settings of `peft.LoraConfig`, such as `base_model_name_or_path` and
        `target_modules` (default: the modules' whole names).
    """
    from peft import LoraConfig

    modules = {matrix: matrix.removesuffix(".weight") for matrix in factors}
    transposed = any(each.transposed for each in factors.values())
    given = {"target_modules": sorted(modules.values()), **(settings or {})}
    # A scale of alpha / rank = 1: the experts' scales are in B.
    config = LoraConfig(r=rank, lora_alpha=rank, fan_in_fan_out=transposed, inference_mode=True, **given).to_dict()
    plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
    tensors: Dict[str, Tensor] = {}
    for matrix, each in factors.items():
        a, b = _padded(each, rank)
        tensors[f"{KEY_PREFIX}{modules[matrix]}.lora_A.weight"] = a
        tensors[f"{KEY_PREFIX}{modules[matrix]}.lora_B.weight"] = b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, json.loads(json.dumps(plain, default=str)))


def _padded(factors: LoraFactors, rank: int) -> Tuple[Tensor, Tensor]:
    """A `[rank, in]` and scale * B `[out, rank]`, float32, filled up with zeros."""
    a = torch.zeros(rank, factors.a.shape[1])
    b = torch.zeros(factors.b.shape[0], rank)
    a[: len(factors.a)] = factors.a
    b[:, : len(factors.a)] = factors.scale * factors.b
    return a, b


def _rank(factors: Mapping[str, LoraFactors], number: int, spec: TaskModelSpec, pad_rank: bool) -> int:
    rank = max(1, *(len(each.a) for each in factors.values()))
    if not pad_rank:
        return rank
    step = next((step for step in VLLM_RANKS if step >= rank), None)
    if step is None:
        reason = f"its rank is {rank}, and vLLM takes adapters of rank up to {VLLM_RANKS[-1]}"
        raise SamError("S803", number=number, name=spec.name, reason=reason)
    return step


def _settings(bank: ExpertBank, spec: TaskModelSpec, factors: Mapping[str, LoraFactors]) -> Dict[str, Any]:
    base, revision = bank.base
    config = read_adapter_config(bank.folder(spec.experts[0]), spec.experts[0])
    modules = sorted(matrix.removesuffix(".weight") for matrix in factors)
    return {
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": _short_names(modules, Path(base)),
        **{key: config[key] for key in COPIED if config.get(key)},
    }


def _short_names(modules: List[str], base: Path) -> List[str]:
    """The modules' last names, as other tools expect them, if these mean the same modules of the base; else whole names."""
    if not base.is_dir():
        return modules
    short = {module.rpartition(".")[2] for module in modules}
    weights = [name.removesuffix(".weight") for name, shape in base_shapes(base).items() if len(shape) == 2]
    meant = sorted(name for name in weights if name.rpartition(".")[2] in short)
    return sorted(short) if meant == modules else modules


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its place if all goes well, and goes if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=".writing-", dir=out.parent))
    try:
        staged = around / out.name  # not `around` itself, which only its owner may read
        staged.mkdir()
        yield staged
        if out.is_dir():
            out.rmdir()  # empty
        os.replace(staged, out)
    finally:
        shutil.rmtree(around, ignore_errors=True)
