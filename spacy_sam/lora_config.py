"""What a PEFT config says of a LoRA adapter's weight change: its scales, and whether it is scale * B @ A at all."""

import json
import math
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Set, Tuple

from .errors import SamError

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OTHER_BASE = "it changes the base's weights before training, and the adapter counts from the changed ones"
# Entries under which the weight change is not scale * B @ A, or not of this base alone, and why.
REFUSED = {
    "use_dora": "DoRA rescales the columns of the base's weight, so its change depends on that weight",
    "lora_bias": "it changes biases, and only weight matrices are merged",
    "use_qalora": "it pools the inputs in groups before A",
    "modules_to_save": "it brings whole modules that were trained beside the factors",
    "layer_replication": "it runs the base's layers more than once, each with factors of its own",
    "trainable_token_indices": "it replaces whole rows of the embedding",
    "target_parameters": "its factors name a module and not the parameter that they change",
    "alora_invocation_tokens": "it works only behind its invocation tokens",
    "arrow_config": "it mixes adapters anew for each token",
    "use_bdlora": "its factors are packed blocks of a block-diagonal matrix",
    "kasa_config": "it drops a part of the base's weights",
    "monteclora_config": "its factors are drawn at random",
    "velora_config": "it keeps state beside the factors",
    "megatron_config": "its factors are shards of a tensor-parallel model",
    "enable_lora": "its factors are grouped convolutions",
}
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights
DECIDING = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias")
# Entries that say where the factors are, how they were trained, or settings of what is refused: the tensors tell the rest.
HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
KNOWN = {*DECIDING, *HARMLESS, *REFUSED}


def read_adapter_config(folder: Path, name: str) -> Dict[str, Any]:
    """Read and check `adapter_config.json`.

    folder (Path): A PEFT adapter folder.
    name (str): The expert's name, for messages.
    RETURNS (Dict[str, Any]): The config; its weight change is scale * B @ A for every matrix.
    RAISES: SamError S104 if files are missing, S118 if the weights are a pickle, S107 if the config is damaged, S106 for a kind
        that cannot be merged.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            if file == WEIGHTS_FILE and (folder / PICKLE_FILE).is_file():
                raise SamError("S118", name=name, path=folder / PICKLE_FILE)
            raise SamError("S104", name=name, path=folder / file)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf8"))
        scales = [(config["r"], config["lora_alpha"]), *_pattern_values(config)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamError("S107", name=name, problem=f"{CONFIG_FILE} cannot be read ({error!r})") from error
    for rank, alpha in scales:
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
        if not (whole and isinstance(alpha, (int, float)) and math.isfinite(alpha)):
            raise SamError("S107", name=name, problem=f"rank {rank!r} and alpha {alpha!r} make no scale")
    for feature, reason in refusals(config):
        raise SamError("S106", name=name, feature=feature, reason=reason)
    return config


def _pattern_values(config: Mapping[str, Any]) -> List[Tuple[Any, Any]]:
    """Rank and alpha of each pattern. RAISES: ValueError for a pattern that is no regular expression."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for pattern in (*ranks, *alphas):
        try:
            re.compile(_whole_name(pattern))
        except re.error as error:
            raise ValueError(f"pattern {pattern!r}: {error}") from error
    return [(rank, 1.0) for rank in ranks.values()] + [(1, alpha) for alpha in alphas.values()]


def refusals(config: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """What in a config cannot be merged exactly, each with the reason; empty if nothing stands in the way."""
    found: List[Tuple[str, str]] = []
    if config.get("peft_type") != "LORA":
        found.append((f"peft_type {config.get('peft_type')!r}", "only LoRA adapters are merged"))
    if config.get("bias", "none") != "none":
        found.append((f"bias={config['bias']!r}", "it changes biases, and only weight matrices are merged"))
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        advice = (
            "save it again with peft's `path_initial_model_for_weight_conversion`, which makes a plain adapter of it"
        )
        found.append((f"init_lora_weights={config['init_lora_weights']!r}", f"{OTHER_BASE}; {advice}"))
    # An empty object is a kind with its default settings, to peft.
    found += [(feature, reason) for feature, reason in REFUSED.items() if config.get(feature) not in (None, False, [])]
    unknown = sorted(key for key in config.keys() - KNOWN if config[key])
    found += [(key, "this version does not know that entry") for key in unknown]
    return found


def rank_choices(config: Mapping[str, Any], module: str) -> Set[int]:
    """Ranks that a module's factors may have: those of the patterns that match it, or the config's own."""
    return _by_pattern(config.get("rank_pattern") or {}, module) or {config["r"]}


def alpha_choices(config: Mapping[str, Any], module: str) -> Set[float]:
    """Alphas that a module may have; of several, nobody knows which.

    The first pattern that matches counts, but peft sorts the patterns when it writes them, and their order is lost. Of ranks, the
    factors' own shapes say which it was.
    """
    return _by_pattern(config.get("alpha_pattern") or {}, module) or {config["lora_alpha"]}


def scale_of(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    """What B @ A is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str) -> Set[Any]:
    """The values of all patterns that are a module's whole name, or the end of it behind a dot, as peft matches them."""
    return {value for key, value in patterns.items() if re.match(_whole_name(key), module)}


def _whole_name(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def deciding_entries(config: Mapping[str, Any]) -> List[Any]:
    """The config entries that decide the weight change, for its hash. Plain adapters have three, as they always had."""
    entries = [config.get(key) for key in ("r", "lora_alpha", "fan_in_fan_out")]
    if config.get("use_rslora"):
        entries.append("use_rslora")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            entries.append((key, sorted(config[key].items())))
    return entries
