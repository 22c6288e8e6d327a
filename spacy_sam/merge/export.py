"""Task models as plain model folders, for transformers, vLLM and others."""

from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Tuple

from ..bank import ExpertBank
from ..models import auto_model
from ..plan import Plan, TaskModelSpec
from ..quiet import quiet_loading
from .materialise import WeightSwitch
from .methods import MergeMethod


def write_task_models(
    bank: ExpertBank, plan: Plan, out: Path, resolve: Callable[[Dict[str, Any]], MergeMethod]
) -> Iterator[Tuple[Path, TaskModelSpec]]:
    """Write base + merged task vector of each task model, in the base's own dtype.

    bank (ExpertBank): The bank the plan was made for.
    plan (Plan): The plan.
    out (Path): Gets a folder `task_model_1`, `task_model_2`, ... with config, safetensors weights and tokenizer, and the
        plan as `plan.json`.
    resolve (Callable): Makes the merge method of a task model's config block.
    YIELDS (Tuple[Path, TaskModelSpec]): Each folder when it is written.
    RAISES: SamError S108, S112 or S116 if the plan is for another bank, or for other versions of its experts.
    """
    from transformers import AutoTokenizer

    bank.check_plan(plan)
    source, revision = bank.base
    with quiet_loading():
        model = auto_model(source, revision).from_pretrained(source, revision=revision, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    switch = WeightSwitch(model, bank.load_adapter, resolve)
    out.mkdir(parents=True, exist_ok=True)
    plan.to_disk(out / "plan.json")
    for number, spec in enumerate(plan.task_models, 1):
        folder = out / f"task_model_{number}"
        switch.use(spec)
        with quiet_loading():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder, spec
