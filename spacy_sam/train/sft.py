"""Supervised fine-tuning of one language model on a schedule of batches: full weights or LoRA, by transformers' Trainer."""

import hashlib
import json
import logging
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import SamError
from ..generate.constrain import Grammar
from ..models import is_tagger
from .data import IGNORED, Example
from .loss import GrammarTrainer, choices
from .tagging import TagCollator, TagTrainer

logger = logging.getLogger("spacy_sam")


@dataclass(frozen=True)
class SftSettings:
    """What decides the result of one run; a checkpoint is only continued under the same settings.

    label_weight: What the choice of a label counts for in the loss under a grammar, where other decisions count 1.
    encoder_learning_rate: That of the encoder and embeddings of an encoder-decoder or a tagger, where it is not `learning_rate`:
        a pretrained encoder forgets what words mean at the rate that a new decoder or classifier needs.
    """

    max_steps: int
    learning_rate: float
    tokens_per_batch: int = 4096
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    bf16: bool = True
    label_weight: float = 1.0
    encoder_learning_rate: Optional[float] = None
    seed: int = 0


class Schedule(TorchDataset):
    """Each item is a whole batch, so that Trainer's batch size is one and lengths in a batch are alike."""

    def __init__(self, batches: Sequence[List[Example]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> List[Example]:
        return self.batches[index]


class Collator:
    """Pads on the left, so that the answers end together and only their logits need to be computed."""

    def __init__(self, pad_id: int, grammar: Optional[Grammar] = None, label_weight: float = 1.0) -> None:
        self.pad_id = pad_id
        self.grammar = grammar
        self.label_weight = label_weight

    def __call__(self, items: List[List[Example]]) -> Dict[str, Any]:
        (examples,) = items
        width = max(len(e.input_ids) for e in examples)
        kept = max(len(e.input_ids) - e.n_prompt for e in examples) + 1
        input_ids = torch.full((len(examples), width), self.pad_id)
        mask = torch.zeros((len(examples), width), dtype=torch.long)
        labels = torch.full((len(examples), width), IGNORED)
        for row, example in enumerate(examples):
            ids = torch.tensor(example.input_ids)
            input_ids[row, width - len(ids) :] = ids
            mask[row, width - len(ids) :] = 1
            labels[row, width - len(ids) + example.n_prompt :] = ids[example.n_prompt :]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "labels": labels[:, width - kept :],
            "logits_to_keep": kept,
            **choices(examples, self.grammar, left=True, label_weight=self.label_weight),
        }


class Seq2SeqCollator:
    """Prompts for the encoder and answers for the decoder, both padded on the right."""

    def __init__(self, pad_id: int, grammar: Optional[Grammar] = None, label_weight: float = 1.0) -> None:
        self.pad_id = pad_id
        self.grammar = grammar
        self.label_weight = label_weight

    def __call__(self, items: List[List[Example]]) -> Dict[str, Any]:
        (examples,) = items
        prompts = [torch.tensor(e.input_ids[: e.n_prompt]) for e in examples]
        answers = [torch.tensor(e.input_ids[e.n_prompt :]) for e in examples]
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad_sequence(answers, batch_first=True, padding_value=IGNORED),
            **choices(examples, self.grammar, left=False, label_weight=self.label_weight),
        }


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint every few minutes, whatever the speed of the machine. The loss up to it is logged into it."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.last >= self.seconds:
            control.should_save = control.should_log = True
            self.last = time.monotonic()
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control


def fine_tune(
    model: Any,
    tokenizer: Any,
    batches: Sequence[List[Example]],
    work: Path,
    settings: SftSettings,
    *,
    grammar: Optional[Grammar] = None,
    save_minutes: float = 3.0,
    progress: bool = True,
) -> float:
    """Train `model` in place on the schedule; continue from the last checkpoint in `work` if there is one.

    model: A causal LM, an encoder-decoder or a tagger, or a PeftModel around one.
    tokenizer: Its tokenizer, with a pad token.
    batches (Sequence[List[Example]]): One micro-batch for each step and accumulation.
    work (Path): Folder for checkpoints (not the result).
    settings (SftSettings): Hyper-parameters.
    grammar (Optional[Grammar]): Takes the loss over what it allows; None for the whole vocabulary.
    RETURNS (float): Mean training loss, that of the steps before the checkpoint included.
    RAISES: SamError S605 if `work` holds a run with other settings or batches, S607 if an encoder's rate is set for a causal LM.
    """
    optimizer = _optimizer(model, settings)
    _check_same_run(work, settings, batches)
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=max(settings.max_steps, 1),
        save_total_limit=2,
        logging_steps=20,
        report_to="none",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer_class, collator = _parts(model, tokenizer.pad_token_id, grammar, settings)
    trainer = trainer_class(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=Schedule(batches),
        callbacks=[SaveEvery(save_minutes)],
        optimizers=(optimizer, None),
    )
    if grammar is not None or model.config.is_encoder_decoder or is_tagger(model.config):
        # The loss is the mean of a micro-batch: BART takes Trainer's count of tokens, and does not look at it.
        trainer.model_accepts_loss_kwargs = False
    checkpoint = last_checkpoint(work)
    if checkpoint:
        logger.info("Continuing from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return _mean_loss(trainer.state.log_history)


def _parts(model: Any, pad_id: int, grammar: Optional[Grammar], settings: SftSettings) -> Tuple[Type[Trainer], Any]:
    """The trainer and the collator for a kind of model."""
    if is_tagger(model.config):
        return TagTrainer, TagCollator(pad_id)
    collator = Seq2SeqCollator if model.config.is_encoder_decoder else Collator
    return GrammarTrainer, collator(pad_id, grammar, settings.label_weight)


def _optimizer(model: Any, settings: SftSettings) -> Optional[torch.optim.Optimizer]:
    """AdamW with another rate for the encoder and the embeddings; None where Trainer's own will do. RAISES: SamError S607."""
    if settings.encoder_learning_rate is None:
        return None
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    if is_tagger(inside.config):
        parts = [inside.base_model]
    elif inside.config.is_encoder_decoder:
        parts = [inside.get_encoder(), inside.get_input_embeddings()]
    else:
        raise SamError("S607", kind=type(inside).__name__)
    slow = {id(parameter) for part in parts for parameter in part.parameters()}
    groups: Dict[Tuple[bool, bool], List[torch.nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        groups.setdefault((id(parameter) in slow, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        {
            "params": parameters,
            "lr": settings.encoder_learning_rate if is_slow else settings.learning_rate,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (is_slow, decays), parameters in groups.items()
    )


def last_checkpoint(work: Path) -> Optional[Path]:
    """The newest checkpoint that was written to its end. RETURNS (Optional[Path]): None if there is none."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((path for path in found if _is_json(path / "trainer_state.json")), None)


def _is_json(path: Path) -> bool:
    """Trainer writes its state last: without it, or with half of it, the run was stopped while saving."""
    try:
        return bool(json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError):
        return False


def _mean_loss(history: Sequence[Dict[str, float]]) -> float:
    """Each logged loss is the mean since the one before; Trainer's own result forgets those before a checkpoint."""
    step, total = 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - step)
            step = entry["step"]
    return total / step if step else 0.0


def _check_same_run(work: Path, settings: SftSettings, batches: Sequence[List[Example]]) -> None:
    path = work / "settings.json"
    wanted = {**asdict(settings), "batches": _hash_batches(batches)}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf8"))
        changed = sorted(key for key in found if found[key] != wanted.get(key))
        if changed:
            raise SamError("S605", path=work, changed=", ".join(changed))
    else:
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=2), encoding="utf8")


def _hash_batches(batches: Sequence[List[Example]]) -> str:
    """What the corpora, the prompt and the tokenizer decide, in 16 hex digits."""
    digest = hashlib.sha256()
    for example in (example for batch in batches for example in batch):
        digest.update(array("q", [example.n_prompt, len(example.input_ids), *example.input_ids]).tobytes())
        if example.tags is not None:
            digest.update(array("q", [*example.tags.types, *example.tags.begins]).tobytes())
    return digest.hexdigest()[:16]
