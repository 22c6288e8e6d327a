"""From a config to a bank: base, one expert for each domain, the unified baseline, dev scores. Finished parts are kept."""

import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import torch

from ..adapters import WEIGHTS_FILE
from ..bank import BANK_FILE, ExpertBank, hash_base
from ..errors import SamError
from ..plan import Centroid, Corpus, Expert
from ..prompts import PromptEncoder, make_format
from ..select.encoder import SentenceEncoder, offline_encoder_path
from ..select.similarity import make_centroid
from .config import DomainSection, RunSection, TrainConfig, expand
from .data import Dataset, draw_batches, load_dataset
from .sft import fine_tune

logger = logging.getLogger("spacy_sam")
BASE_DIR, UNIFIED = "base", "unified"
Report = Callable[[str], None]


def train_bank(
    config: TrainConfig,
    out: Path,
    *,
    work: Optional[Path] = None,
    progress: bool = True,
    report: Report = logger.info,
) -> ExpertBank:
    """Train a bank, or go on with one: what is in the bank already is left as it is.

    config (TrainConfig): See `config.read_config`.
    out (Path): The bank's folder.
    work (Optional[Path]): Folder for checkpoints; `out` with `.work` after its name by default.
    progress (bool): Show progress bars.
    report (Callable[[str], None]): Told what is being done, a line at a time.
    RETURNS (ExpertBank): The bank with all its experts. Dev scores are `scores.score_bank`'s work.
    RAISES: SamError S602 to S605 for data and checkpoints that do not fit, before any training.

    Runs unchanged under `accelerate launch` and `torchrun`: every process trains, the main one writes.
    """
    from accelerate import PartialState

    state = PartialState()
    say: Report = report if state.is_main_process else _silent
    work = work or out.with_name(out.name + ".work")
    domains = {name: load_domain(section) for name, section in config.domains.items()}
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        _prepare_base(config, domains, out, say)
    state.wait_for_everyone()
    if not (out / BANK_FILE).is_file():
        _train_base(config, domains, out, work, progress, say, state)
    bank = ExpertBank(out)
    for name, datasets in domains.items():
        if name not in bank:
            say(f"Expert '{name}': {sum(len(d.records) for d in datasets)} texts of {len(datasets)} corpora")
            _train_adapter(config, config.expert_training, bank, name, "expert", datasets, work, progress, say, state)
            bank = ExpertBank(out)
    if config.unified_training and UNIFIED not in bank:
        say("Unified baseline: all domains together")
        together = [dataset for datasets in domains.values() for dataset in datasets]
        _train_adapter(config, config.unified_training, bank, UNIFIED, "baseline", together, work, progress, say, state)
        bank = ExpertBank(out)
    return bank


def load_domain(section: DomainSection) -> List[Dataset]:
    """The training corpora of one domain."""
    return [load_dataset(path) for path in expand(section.train)]


def _silent(message: str) -> None:
    """Processes other than the main one say nothing."""


def _prepare_base(config: TrainConfig, domains: Dict[str, List[Dataset]], out: Path, say: Report) -> None:
    """Write the untrained base of the kinds that are built here."""
    if config.base.kind == "hub" or (out / BASE_DIR / "config.json").is_file() or (out / BANK_FILE).is_file():
        return
    from .base import build_tokenizer, decoder_from_encoder, random_llama

    torch.manual_seed(config.seed)
    texts = (record.text for datasets in domains.values() for d in datasets for record in d.records)
    say("Base: learning the vocabulary")
    if config.base.kind == "encoder":
        source = config.base.source or offline_encoder_path()
        if source is None:
            raise SamError("S303", reason="[base] source is empty and the offline extra is not installed")
        tokenizer = build_tokenizer(texts, config.base.vocab_size, config.base.context, Path(source))
        model: Any = decoder_from_encoder(tokenizer, Path(source))
    else:
        tokenizer = build_tokenizer(texts, config.base.vocab_size, config.base.context)
        model = random_llama(tokenizer, config.base.hidden_size, config.base.n_layers, config.base.n_heads)
    _save_base(model, tokenizer, out / BASE_DIR)


def _train_base(
    config: TrainConfig,
    domains: Dict[str, List[Dataset]],
    out: Path,
    work: Path,
    progress: bool,
    say: Report,
    state: Any,
) -> None:
    source = config.base.source if config.base.kind == "hub" else str(out / BASE_DIR)
    details: Dict[str, Any] = {"base_kind": config.base.kind, "seed": config.seed}
    if config.base_training and config.base.kind != "hub":
        model, tokenizer = load_base(str(source), None)
        together = [dataset for datasets in domains.values() for dataset in datasets]
        say(f"Base: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(together)} corpora")
        batches = _schedule(config, config.base_training, tokenizer, together, config.seed, state)
        settings = config.base_training.settings(config.seed)
        loss = fine_tune(
            model, tokenizer, batches, work / BASE_DIR, settings, save_minutes=config.save_minutes, progress=progress
        )
        details["base_training"] = {**config.base_training.model_dump(), "loss": round(loss, 4)}
        if state.is_main_process:
            _save_base(model, tokenizer, out / BASE_DIR)
    if state.is_main_process:
        ExpertBank.create(
            out,
            base=BASE_DIR if config.base.kind != "hub" else str(config.base.source),
            revision=config.base.revision,
            prompt=_prompt(config),
            encoder=config.bank.encoder,
            name=config.bank.name,
            details=details,
        )
    state.wait_for_everyone()


def _train_adapter(
    config: TrainConfig,
    run: RunSection,
    bank: ExpertBank,
    name: str,
    role: str,
    datasets: Sequence[Dataset],
    work: Path,
    progress: bool,
    say: Report,
    state: Any,
) -> None:
    from peft import LoraConfig, get_peft_model

    seed = config.seed + 1 + sorted([*config.domains, UNIFIED]).index(name)
    torch.manual_seed(seed)
    base, tokenizer = load_base(*bank.base)
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=config.lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    batches = _schedule(config, run, tokenizer, datasets, seed, state)
    checkpoints = work / name
    settings = run.settings(seed)
    loss = fine_tune(
        model, tokenizer, batches, checkpoints, settings, save_minutes=config.save_minutes, progress=progress
    )
    if state.is_main_process:
        folder = checkpoints / "adapter"
        _save_adapter(model, folder)
        card = _card(config, bank, name, role, datasets)
        training = {**run.model_dump(), "seed": seed, "loss": round(loss, 4)}
        bank.add(name, folder, replace(card, training=training))
        say(f"'{name}' is in the bank (mean training loss {loss:.3f})")
    state.wait_for_everyone()


def _card(config: TrainConfig, bank: ExpertBank, name: str, role: str, datasets: Sequence[Dataset]) -> Expert:
    centroid: Optional[Centroid] = None
    if role == "expert":
        encoder = SentenceEncoder(config.bank.encoder, path=config.bank.encoder_path)
        texts = sample_texts(datasets, config.bank.centroid_texts, config.seed)
        centroid = make_centroid(encoder(texts), encoder.name)
    return Expert(
        name=name,
        domain=name.replace("_", " "),
        labels=tuple(sorted({label for dataset in datasets for label in dataset.labels})),
        base_hash=bank.base_hash,
        role=role,
        corpora=tuple(Corpus(d.name, len(d.records), d.labels) for d in datasets),
        lora=config.lora.model_dump(),
        prompt=_prompt(config),
        centroid=centroid,
    )


def sample_texts(datasets: Sequence[Dataset], n_texts: int, seed: int) -> List[str]:
    """Training texts for a centroid, the same number from each corpus as far as they reach."""
    rng = random.Random(seed)
    share = -(-n_texts // len(datasets))
    return [r.text for d in datasets for r in rng.sample(d.records, min(share, len(d.records)))]


def load_base(source: str, revision: Optional[str]) -> tuple:
    """A base in float32 with its tokenizer, for training. RETURNS (tuple): model, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _schedule(
    config: TrainConfig, run: RunSection, tokenizer: Any, datasets: Sequence[Dataset], seed: int, state: Any
) -> List[list]:
    return draw_batches(
        datasets,
        PromptEncoder(tokenizer, make_format(_prompt(config))),
        n_batches=run.max_steps * run.gradient_accumulation * state.num_processes,
        tokens_per_batch=run.tokens_per_batch,
        max_length=config.data.max_length,
        max_labels=config.data.max_labels,
        seed=seed,
    )


def _prompt(config: TrainConfig) -> Dict[str, Any]:
    return {
        "name": config.bank.prompt,
        "instruction": config.bank.instruction,
        "max_labels": config.data.max_labels,
    }


def _save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """bfloat16 safetensors, written beside and renamed."""
    staged = folder.with_name(folder.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(staged)
    model.to(dtype)
    tokenizer.save_pretrained(staged)
    hash_base(staged)
    shutil.rmtree(folder, ignore_errors=True)
    staged.replace(folder)


def _save_adapter(model: Any, folder: Union[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    model.save_pretrained(str(folder))
    path = Path(folder) / WEIGHTS_FILE
    tensors = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
