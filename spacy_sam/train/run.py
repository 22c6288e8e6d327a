"""From a config to a bank: base, an expert for each domain, the unified baseline. What is finished is left as it is."""

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from ..bank import BANK_FILE, ExpertBank, write_json
from ..corpora import Dataset, load_dataset
from ..errors import SamError
from ..generate.constrain import InlineGrammar
from ..generate.tagging import TagEncoder
from ..lora_config import WEIGHTS_FILE
from ..models import auto_model, is_tagger
from ..plan import Centroid, Corpus, Expert
from ..prompts import InlineFormat, PromptEncoder, make_format
from ..quiet import quiet_loading
from ..select.encoder import SentenceEncoder, offline_encoder_path
from ..select.similarity import make_centroid
from .config import RunSection, TrainConfig, expand, read_aliases
from .data import draw_batches
from .sft import fine_tune

logger = logging.getLogger("spacy_sam")
BASE_DIR, UNIFIED, STAGES_FILE = "base", "unified", "base_stages.json"
Report = Callable[[str], None]


def train_bank(
    config: TrainConfig,
    out: Path,
    *,
    work: Optional[Path] = None,
    progress: bool = True,
    report: Report = logger.info,
) -> ExpertBank:
    """Train a bank, or go on with one.

    config (TrainConfig): See `config.read_config`.
    out (Path): The bank's folder.
    work (Optional[Path]): Folder for checkpoints; `out` with `.work` after its name by default.
    progress (bool): Show progress bars.
    report (Callable[[str], None]): Told what is being done, a line at a time.
    RETURNS (ExpertBank): The bank with all its experts. Dev scores are `scores.score_bank`'s work.
    RAISES: SamError S602 to S606 for data and checkpoints that do not fit.

    Runs unchanged under `accelerate launch` and `torchrun`: every process trains, the main one writes.
    """
    run = _Run(config, out, work or out.with_name(out.name + ".work"), progress, report)
    run.base()
    for name, datasets in run.domains.items():
        run.adapter(name, "expert", datasets, config.expert_training)
    if config.unified_training:
        run.adapter(UNIFIED, "baseline", run.everything, config.unified_training)
    return ExpertBank(out)


def is_main_process() -> bool:
    """Whether this process writes and reports: the only one, or the first of `accelerate launch` or `torchrun`."""
    return _process_state().is_main_process


def _process_state() -> Any:
    from accelerate import PartialState

    # Without `cpu`, accelerate takes each of several CPU processes for the only one.
    return PartialState(cpu=not torch.cuda.is_available())


class _Run:
    """One call of `train_bank`: its settings, corpora and processes."""

    def __init__(self, config: TrainConfig, out: Path, work: Path, progress: bool, report: Report) -> None:
        self.config = config
        self.out = out
        self.work = work
        self.progress = progress
        self.state = _process_state()
        self.say: Report = report if self.state.is_main_process else _silent
        self.domains: Dict[str, List[Dataset]] = {
            name: [load_dataset(path) for path in expand(section.train)] for name, section in config.domains.items()
        }
        self.general = [load_dataset(path) for path in expand(config.data.general)]
        self.aliases = read_aliases(config.data.aliases)
        self.prompt = {
            "name": config.bank.prompt,
            "instruction": config.bank.instruction,
            "max_labels": config.data.max_labels,
        }

    @property
    def everything(self) -> List[Dataset]:
        """The corpora of all domains."""
        return [dataset for datasets in self.domains.values() for dataset in datasets]

    def base(self) -> None:
        """Make the base, train it if the config says so, and open the bank around it."""
        if (self.out / BANK_FILE).is_file():
            return
        built_here = self.config.base.kind != "hub"
        stages = self._stage_corpora() if built_here else {}
        details: Dict[str, Any] = {"base_kind": self.config.base.kind, "seed": self.config.seed}
        if built_here and self.state.is_main_process:
            self._write_untrained_base()
        self.state.wait_for_everyone()
        if stages:
            details["base_training"] = self._train_base(stages)
        if self.state.is_main_process:
            ExpertBank.create(
                self.out,
                base=BASE_DIR if built_here else str(self.config.base.source),
                revision=self.config.base.revision,
                prompt=self.prompt,
                encoder=self.config.bank.encoder,
                name=self.config.bank.name,
                details=details,
            )
        self.state.wait_for_everyone()

    def _write_untrained_base(self) -> None:
        if (self.out / BASE_DIR / "config.json").is_file():
            return
        from .base import random_llama, tagger_from_encoder
        from .vocab import build_tokenizer, cased_word_pieces

        (self.work / STAGES_FILE).unlink(missing_ok=True)  # what they made is gone, if there were any
        self.say("Base: learning the vocabulary")
        section = self.config.base
        torch.manual_seed(self.config.seed)
        datasets = [load_dataset(path) for path in expand(section.texts)] or self.everything
        texts = (record.text for dataset in datasets for record in dataset.records)
        if section.kind == "tagger":
            source = section.source or offline_encoder_path()
            if source is None:
                raise SamError("S303", reason="[base] source is empty and the offline extra is not installed")
            marks = make_format(self.prompt).marks
            tokenizer, pieces = cased_word_pieces(texts, Path(source), section.vocab_size, section.context, marks)
            model: Any = tagger_from_encoder(tokenizer, pieces, Path(source))
        else:
            tokenizer = build_tokenizer(texts, section.vocab_size, section.context)
            model = random_llama(tokenizer, section.hidden_size, section.n_layers, section.n_heads)
        self.out.mkdir(parents=True, exist_ok=True)
        save_base(model, tokenizer, self.out / BASE_DIR)

    def _stage_corpora(self) -> Dict[str, List[Dataset]]:
        """All are read before the first stage begins, so that none turns out to be missing hours later."""
        stages = self.config.base_training.items()
        return {name: [load_dataset(p) for p in expand(run.corpora)] or self.everything for name, run in stages}

    def _train_base(self, stages: Dict[str, List[Dataset]]) -> Dict[str, Any]:
        """Run the stages that are not finished, each on the result of the one before. RETURNS: Settings and losses."""
        done: Dict[str, Any] = self._finished_stages()
        for number, (name, datasets) in enumerate(stages.items()):
            if name in done:
                continue
            run = self.config.base_training[name]
            model, tokenizer = load_base(str(self.out / BASE_DIR), None)
            n_parameters = sum(parameter.numel() for parameter in model.parameters())
            self.say(f"Base, stage '{name}': {n_parameters / 1e6:.1f} M parameters, {len(datasets)} corpora")
            work = self.work / BASE_DIR / name
            seed = self.config.seed + number
            loss = self._fine_tune(model, tokenizer, datasets, run, seed, work)
            done[name] = {**run.model_dump(exclude={"corpora"}), "loss": loss}
            if self.state.is_main_process:
                save_base(model, tokenizer, self.out / BASE_DIR)
                write_json(self.work / STAGES_FILE, done)
            self.state.wait_for_everyone()
        return done

    def _finished_stages(self) -> Dict[str, Any]:
        path = self.work / STAGES_FILE
        return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}

    def adapter(self, name: str, role: str, datasets: Sequence[Dataset], run: RunSection) -> None:
        """Train one LoRA adapter and put it into the bank, if it is not there."""
        bank = ExpertBank(self.out)
        if name in bank:
            self._say_what_changed(bank[name], datasets, run)
            return
        from peft import LoraConfig, get_peft_model

        self.say(f"'{name}': {sum(len(d.records) for d in datasets)} texts of {len(datasets)} corpora")
        seed = self.config.seed + 1 + sorted([*self.config.domains, UNIFIED]).index(name)
        torch.manual_seed(seed)
        base, tokenizer = load_base(*bank.base)
        section = self.config.lora
        lora = LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft takes floats, too
            target_modules=section.target_modules,
            bias="none",
            task_type=peft_task(base.config),
        )
        with quiet_loading():
            model = get_peft_model(base, lora)
        general, share = self.general, self.config.data.general_share
        work = self.work / name
        loss = self._fine_tune(model, tokenizer, datasets, run, seed, work, general=general, general_share=share)
        if self.state.is_main_process:
            folder = self.work / name / "adapter"
            inside = Path(bank.base[0]).parent == bank.path
            save_adapter(model, folder, f"../../{BASE_DIR}" if inside else bank.base[0])
            card = self._card(bank, name, role, datasets)
            training = {**run.model_dump(), "general_share": share, "seed": seed, "loss": loss}
            bank.add(name, folder, replace(card, training=training))
            self.say(f"'{name}' is in the bank (mean training loss {loss:.3f})")
        self.state.wait_for_everyone()

    def _say_what_changed(self, card: Expert, datasets: Sequence[Dataset], run: RunSection) -> None:
        """A finished adapter is left as it is, but nobody should take it for one of the config as it is now."""
        wanted: Dict[str, Any] = {**run.model_dump(), "corpora": sorted(d.name for d in datasets)}
        found: Dict[str, Any] = {**card.training, "corpora": sorted(corpus.name for corpus in card.corpora)}
        changed = [key for key in wanted if key in found and found[key] != wanted[key]]
        if changed:
            self.say(
                f"'{card.name}' was trained with other settings ({', '.join(changed)}) and is left as it is: "
                f"remove it from the bank to train it again"
            )

    def _fine_tune(
        self,
        model: Any,
        tokenizer: Any,
        datasets: Sequence[Dataset],
        run: RunSection,
        seed: int,
        work: Path,
        *,
        general: Sequence[Dataset] = (),
        general_share: float = 0.0,
    ) -> float:
        encoder = PromptEncoder(tokenizer, make_format(self.prompt))
        is_tagging = is_tagger(model.config)
        # Answers in lines are learnt whole, so that they can be read without a grammar too.
        is_inline = isinstance(encoder.format, InlineFormat) and not is_tagging
        grammar = InlineGrammar(encoder) if is_inline else None
        batches = draw_batches(
            datasets,
            TagEncoder(encoder) if is_tagging else encoder,
            n_batches=run.max_steps * run.gradient_accumulation * self.state.num_processes,
            tokens_per_batch=run.tokens_per_batch,
            max_length=self.config.data.max_length,
            max_labels=self.config.data.max_labels,
            seed=seed,
            aliases=self.aliases,
            grammar=grammar,
            general=general,
            general_share=general_share,
        )
        loss = fine_tune(
            model,
            tokenizer,
            batches,
            work,
            run.settings(seed),
            grammar=grammar,
            save_minutes=self.config.save_minutes,
            progress=self.progress,
        )
        return round(loss, 4)

    def _card(self, bank: ExpertBank, name: str, role: str, datasets: Sequence[Dataset]) -> Expert:
        centroid: Optional[Centroid] = None
        if role == "expert":
            encoder = SentenceEncoder(self.config.bank.encoder, path=self.config.bank.encoder_path)
            texts = sample_texts(datasets, self.config.bank.centroid_texts, self.config.seed)
            centroid = make_centroid(encoder(texts), encoder.name)
        return Expert(
            name=name,
            domain=name.replace("_", " "),
            labels=tuple(sorted({label for dataset in datasets for label in dataset.labels})),
            base_hash=bank.base_hash,
            role=role,
            corpora=tuple(Corpus(d.name, len(d.records), d.labels) for d in datasets),
            lora=self.config.lora.model_dump(),
            prompt=dict(self.prompt),
            centroid=centroid,
        )


def peft_task(config: Any) -> Optional[str]:
    """peft's name for a kind of model. Not TOKEN_CLS for a tagger: that keeps a whole classifier beside the adapter."""
    if is_tagger(config):
        return None
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def _silent(message: str) -> None:
    """Processes other than the main one say nothing."""


def sample_texts(datasets: Sequence[Dataset], n_texts: int, seed: int) -> List[str]:
    """Training texts for a centroid, the same number from each corpus as far as they reach."""
    rng = random.Random(seed)
    share = -(-n_texts // len(datasets))
    return [r.text for d in datasets for r in rng.sample(d.records, min(share, len(d.records)))]


def load_base(source: str, revision: Optional[str]) -> Tuple[Any, Any]:
    """A base in float32 and its tokenizer, for training."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    # On the CPU, attention in bfloat16 is several times slower by torch's own kernel than written out.
    attention = None if torch.cuda.is_available() else "eager"
    kwargs = {"revision": revision, "dtype": torch.float32, "attn_implementation": attention}
    with quiet_loading():
        model = auto_model(source, revision).from_pretrained(source, **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def save_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a base as bfloat16 safetensors, beside and renamed. The model is left in bfloat16."""
    staged = folder.with_name(folder.name + ".part")
    shutil.rmtree(staged, ignore_errors=True)
    with quiet_loading():
        model.to(torch.bfloat16).save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(folder, ignore_errors=True)
    staged.replace(folder)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write a PeftModel's adapter as bfloat16 safetensors. Its config names `base`, and is the same in every process."""
    from safetensors.torch import load_file, save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(str(folder), save_embedding_layers=False)  # else peft looks for the base on the hub
    path = folder / WEIGHTS_FILE
    tensors = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
