"""The training config: a spaCy `.cfg` file, checked as a whole before any work starts."""

from pathlib import Path
from typing import Any, Dict, List, Literal, Mapping, Optional, Union

from confection import Config
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import SamError
from ..prompts import LinesFormat
from ..select.encoder import DEFAULT_ENCODER
from .sft import SftSettings


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BankSection(Section):
    """Name of the bank, prompt instruction, and the encoder of the centroids."""

    name: str = "bank"
    instruction: str = ""
    prompt: str = LinesFormat.name
    encoder: str = DEFAULT_ENCODER
    encoder_path: Optional[str] = None
    centroid_texts: int = Field(default=2000, ge=1)


class BaseSection(Section):
    """Where the base comes from.

    kind "hub": a causal LM or an encoder-decoder by path or hub id (`source`, `revision`), used as it is. "tagger": a tagger made
    from an uncased BERT-shaped encoder (`source`; empty for the offline extra's MiniLM), with its word pieces in a cased
    vocabulary. "random": a small Llama from nothing. The last two are written into the bank, and trained if there are
    `[base_training.STAGE]` sections.

    texts: Glob patterns of corpora that the vocabulary is learned from; empty for those of all domains.
    """

    kind: Literal["hub", "tagger", "random"]
    source: Optional[str] = None
    revision: Optional[str] = None
    texts: List[str] = []
    vocab_size: int = Field(default=20000, ge=300)
    context: int = Field(default=512, ge=64)
    hidden_size: int = Field(default=256, ge=8)
    n_layers: int = Field(default=4, ge=1)
    n_heads: int = Field(default=4, ge=1)


class LoraSection(Section):
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    target_modules: Union[str, List[str]] = "all-linear"


class RunSection(Section):
    """One training run; see `sft.SftSettings`."""

    max_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    tokens_per_batch: int = Field(default=4096, ge=64)
    warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_accumulation: int = Field(default=1, ge=1)
    bf16: bool = True
    label_weight: float = Field(default=1.0, gt=0)
    encoder_learning_rate: Optional[float] = Field(default=None, gt=0)

    def settings(self, seed: int) -> SftSettings:
        return SftSettings(**self.model_dump(include=set(RunSection.model_fields)), seed=seed)


class BaseRunSection(RunSection):
    """One stage of the base's training.

    corpora: Glob patterns of its texts; empty for the corpora of all domains.
    """

    corpora: List[str] = []


class DataSection(Section):
    """How examples are made.

    max_length: The longest one, in tokens. max_labels: The most labels one prompt asks. aliases: A JSON file of other
    names for types, `{"type": ["other name", ...]}`, some of which are asked instead. general: Glob patterns of corpora of no
    domain, of which every expert and the unified baseline also get a `general_share` of their examples, so that what the
    base can do with other types is not unlearned.
    """

    max_length: int = Field(default=256, ge=32)
    max_labels: int = Field(default=16, ge=1)
    aliases: Optional[str] = None
    general: List[str] = []
    general_share: float = Field(default=0.0, ge=0, lt=1)


class DomainSection(Section):
    """One expert: glob patterns of its corpora. Dev sets are only scored, never trained on."""

    train: List[str] = Field(min_length=1)
    dev: List[str] = []


class TrainConfig(Section):
    """Everything `spacy sam train` needs. `base_training` are stages by name, run in the order of the file."""

    bank: BankSection = BankSection()
    base: BaseSection
    base_training: Dict[str, BaseRunSection] = {}
    lora: LoraSection = LoraSection()
    expert_training: RunSection
    unified_training: Optional[RunSection] = None
    data: DataSection = DataSection()
    domains: Dict[str, DomainSection] = Field(min_length=1)
    dev_texts: int = Field(default=200, ge=1)
    save_minutes: float = Field(default=3.0, gt=0)
    seed: int = 0
    paths: Dict[str, Optional[str]] = {}


def read_config(path: Path, overrides: Mapping[str, Any] = {}) -> TrainConfig:
    """Read and check a training config.

    path (Path): The `.cfg` file.
    overrides (Mapping[str, Any]): Values by dotted name, as in `--paths.data corpora`.
    RETURNS (TrainConfig): Checked; `[training]` entries are at its top.
    RAISES: SamError S601 with every problem found.
    """
    if not path.is_file():
        raise SamError("S601", path=path, problems="there is no such file")
    try:
        raw = Config().from_disk(path, interpolate=True, overrides=dict(overrides))
    except ValueError as error:
        raise SamError("S601", path=path, problems=error) from error
    data = {key: value for key, value in raw.items() if key != "training"}
    data.update(raw.get("training", {}))
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SamError("S601", path=path, problems=problems) from error


def read_aliases(path: Optional[str]) -> Dict[str, List[str]]:
    """Other names of types. RAISES: SamError S602 if there is no such file, S601 if it is not names by type."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise SamError("S602", path=path)
    try:
        return TypeAdapter(Dict[str, List[str]]).validate_json(Path(path).read_bytes())
    except ValidationError as error:
        raise SamError("S601", path=path, problems=error) from error


def expand(patterns: List[str]) -> List[Path]:
    """Files of glob patterns, sorted. RAISES: SamError S602 if a pattern matches nothing."""
    found: List[Path] = []
    for pattern in patterns:
        root = Path(pattern).anchor or "."
        relative = str(Path(pattern).relative_to(root)) if Path(pattern).is_absolute() else pattern
        matches = sorted(p for p in Path(root).glob(relative) if p.is_file())
        if not matches:
            raise SamError("S602", path=pattern)
        found.extend(matches)
    return found
