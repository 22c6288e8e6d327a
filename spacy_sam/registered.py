"""The registered functions, as entry points of the package: swappable parts are chosen by name in the config.

Nothing heavy is imported before a function is called.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

from .errors import check_finite, check_whole

if TYPE_CHECKING:
    from .bank import ExpertBank
    from .generate.engine import Engine
    from .merge.factors import FactorMethod
    from .merge.methods import MergeMethod
    from .select.base import Selector
    from .select.strategies import Strategy


def make_ties(density: float = 0.2, scale: float = 1.0, trim: str = "matrix") -> "MergeMethod":
    """`spacy_sam.TIES.v1`: see `merge.methods.Ties`."""
    from .merge.methods import Ties

    return Ties(density, scale, trim)


def make_mean(scale: float = 1.0) -> "MergeMethod":
    """`spacy_sam.Mean.v1`: see `merge.methods.mean`."""
    from .merge.methods import Mean

    return Mean(scale)


def make_task_arithmetic(scale: float = 0.4) -> "MergeMethod":
    """`spacy_sam.TaskArithmetic.v1`: see `merge.methods.task_arithmetic`."""
    from .merge.methods import TaskArithmetic

    return TaskArithmetic(scale)


def make_dare(density: float = 0.5, scale: float = 0.4, seed: int = 0) -> "MergeMethod":
    """`spacy_sam.DARE.v1`: see `merge.methods.dare`."""
    from .merge.methods import Dare

    return Dare(density, scale, seed)


def make_dare_ties(density: float = 0.5, scale: float = 1.0, seed: int = 0) -> "MergeMethod":
    """`spacy_sam.DARETIES.v1`: see `merge.pruning.dare_ties`."""
    from .merge.pruning import DareTies

    return DareTies(density, scale, seed)


def make_della(
    density: float = 0.7, window: float = 0.14, scale: float = 1.1, seed: int = 0, combine: str = "ties"
) -> "MergeMethod":
    """`spacy_sam.DELLA.v1`: see `merge.pruning.della`."""
    from .merge.pruning import Della

    return Della(density, window, scale, seed, combine)


def make_breadcrumbs(density: float = 0.15, gamma: float = 0.006, scale: float = 0.2) -> "MergeMethod":
    """`spacy_sam.Breadcrumbs.v1`: see `merge.pruning.breadcrumbs`."""
    from .merge.pruning import Breadcrumbs

    return Breadcrumbs(density, gamma, scale)


def make_pcb(density: float = 0.1, scale: float = 1.2) -> "MergeMethod":
    """`spacy_sam.PCB.v1`: see `merge.pruning.pcb`."""
    from .merge.pruning import Pcb

    return Pcb(density, scale)


def make_star(eta: float = 40.0, scale: float = 1.0) -> "FactorMethod":
    """`spacy_sam.STAR.v1`: see `merge.subspace.star`."""
    from .merge.subspace import Star

    return Star(eta, scale)


def make_iso_c(scale: float = 1.0) -> "FactorMethod":
    """`spacy_sam.IsoC.v1`: see `merge.subspace.iso_c`."""
    from .merge.subspace import IsoC

    return IsoC(scale)


def make_tsv_m(scale: float = 1.0) -> "FactorMethod":
    """`spacy_sam.TSVM.v1`: see `merge.subspace.tsv_m`."""
    from .merge.subspace import Tsvm

    return Tsvm(scale)


def make_knots(density: float = 1.0, scale: float = 0.5) -> "FactorMethod":
    """`spacy_sam.KnOTS.v1`: see `merge.subspace.knots`."""
    from .merge.subspace import Knots

    return Knots(density, scale)


def make_core_space(inner: Any = None) -> "FactorMethod":
    """`spacy_sam.CoreSpace.v1`: see `merge.subspace.core_space`. `inner` is a block such as TIES'; None is TIES."""
    from .merge.methods import Ties
    from .merge.subspace import CoreSpace

    return CoreSpace(inner if inner is not None else Ties())


def make_domain_similarity() -> "Selector":
    """`spacy_sam.DomainSimilarity.v1`: see `select.similarity`."""
    from .select.similarity import DomainSimilarity

    return DomainSimilarity()


def make_type_similarity() -> "Selector":
    """`spacy_sam.TypeSimilarity.v1`: see `select.types`."""
    from .select.types import TypeSimilarity

    return TypeSimilarity()


def make_sampling_evaluation(sample_size: int = 10) -> "Selector":
    """`spacy_sam.SamplingEvaluation.v1`: see `select.sampling`."""
    from .select.sampling import SamplingEvaluation

    return SamplingEvaluation(sample_size)


def make_sam(selectors: Dict[str, Any], merge: Any, n_experts: int = 3, lead: Optional[float] = None) -> "Strategy":
    """`spacy_sam.SaM.v1`: see `select.strategies.SaM`. `selectors` are asked in the order given; None leaves one out.

    spaCy merges a config into the default one, so a default selector goes away by being None, not by being left out.
    """
    from .select.strategies import SaM

    return SaM(_given(selectors), merge, n_experts, lead)


def make_sam_eco(selectors: Dict[str, Any], merge: Any, n_experts: int = 3, lead: Optional[float] = None) -> "Strategy":
    """`spacy_sam.SaMEco.v1`: see `select.strategies.SaMEco`, and `make_sam` for `selectors`."""
    from .select.strategies import SaMEco

    return SaMEco(_given(selectors), merge, n_experts, lead)


def make_adaptive(selectors: Dict[str, Any], merge: Any, max_experts: int = 6, sample_size: int = 30) -> "Strategy":
    """`spacy_sam.Adaptive.v1`: see `select.adaptive.Adaptive`, and `make_sam` for `selectors`."""
    from .select.adaptive import Adaptive

    return Adaptive(_given(selectors), merge, max_experts, sample_size)


def make_weighted(selector: Any, merge: Any, temperature: float = 0.2, least: float = 0.1) -> "Strategy":
    """`spacy_sam.Weighted.v1`: see `select.weighted.Weighted`."""
    from .select.weighted import Weighted

    return Weighted(selector, merge, temperature, least)


def _given(selectors: Dict[str, Any]) -> Tuple[Any, ...]:
    return tuple(selector for selector in selectors.values() if selector is not None)


@dataclass(frozen=True)
class TorchEngineMaker:
    """Loads a `TorchEngine` for a bank when it is called, so that a pipeline can be built and saved without weights."""

    device: Optional[str] = None
    dtype: Optional[str] = None
    max_new_tokens: int = 320
    tokens_per_batch: int = 8192
    local_files_only: bool = False
    constrained: bool = True
    entity_bias: Optional[float] = None
    cache_bytes: int = 1 << 30
    cache_dir: Optional[str] = None
    cache_dir_bytes: int = 1 << 36

    def __post_init__(self) -> None:
        for setting in ("max_new_tokens", "tokens_per_batch"):
            check_whole(setting, getattr(self, setting))
        for setting in ("cache_bytes", "cache_dir_bytes"):
            check_whole(setting, getattr(self, setting), least=0)
        if self.entity_bias is not None:
            check_finite("entity_bias", self.entity_bias)

    def __call__(self, bank: "ExpertBank") -> "Engine":
        from .generate.torch_engine import TorchEngine

        return TorchEngine(bank, resolve_method, **self.__dict__)


def make_torch_engine(
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    max_new_tokens: int = 320,
    tokens_per_batch: int = 8192,
    local_files_only: bool = False,
    constrained: bool = True,
    entity_bias: Optional[float] = None,
    cache_bytes: int = 1 << 30,
    cache_dir: Optional[str] = None,
    cache_dir_bytes: int = 1 << 36,
) -> TorchEngineMaker:
    """`spacy_sam.TorchEngine.v1`: see `generate.torch_engine`."""
    return TorchEngineMaker(
        device,
        dtype,
        max_new_tokens,
        tokens_per_batch,
        local_files_only,
        constrained,
        entity_bias,
        cache_bytes,
        cache_dir,
        cache_dir_bytes,
    )


@dataclass(frozen=True)
class VLLMEngineMaker:
    """Makes a `VLLMEngine` for a bank when it is called, so that a pipeline can be built and saved without vLLM."""

    python: Optional[str] = None
    cache: Optional[str] = None
    max_task_models: int = 4
    dtype: Optional[str] = None
    max_new_tokens: int = 320
    constrained: bool = True
    entity_bias: Optional[float] = None
    options: Dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for setting in ("max_task_models", "max_new_tokens"):
            check_whole(setting, getattr(self, setting))
        if self.entity_bias is not None:
            check_finite("entity_bias", self.entity_bias)

    def __call__(self, bank: "ExpertBank") -> "Engine":
        from .generate.vllm_engine import VLLMEngine

        return VLLMEngine(bank, resolve_method, **self.__dict__)


def make_vllm_engine(
    python: Optional[str] = None,
    cache: Optional[str] = None,
    max_task_models: int = 4,
    dtype: Optional[str] = None,
    max_new_tokens: int = 320,
    constrained: bool = True,
    entity_bias: Optional[float] = None,
    options: Optional[Dict[str, Any]] = None,
) -> VLLMEngineMaker:
    """`spacy_sam.VLLMEngine.v1`: see `generate.vllm_engine`."""
    return VLLMEngineMaker(
        python, cache, max_task_models, dtype, max_new_tokens, constrained, entity_bias, dict(options or {})
    )


def resolve_method(config: Dict[str, Any]) -> "MergeMethod":
    """Make the merge method of a plan's config block; an empty block is TIES with its defaults."""
    from spacy import registry

    return registry.resolve({"method": dict(config) or {"@misc": "spacy_sam.TIES.v1"}})["method"]
