"""The settings of `sam_ner`: defaults, checks, labels."""

import json
from typing import Any, Dict, NamedTuple, Optional, Sequence, Union

from .annotate import check_labels
from .errors import SamError
from .plan import Plan

SPANS_KEY = "sc"
# The TIES paper's settings are .2 and 1. On the bundled bank these change the weights too much: docs/experiments.md, trial 13.
DENSITY, SCALE = 0.5, 0.5
# Between the leads of experts in a domain that one of them knows (.32 and more) and in others (.15 and less): trial 30.
LEAD = 0.25
MODES = ("stream", "once", "manual")
Labels = Union[Sequence[str], Dict[str, str]]
DEFAULT_CONFIG: Dict[str, Any] = {
    "bank": None,
    "labels": [],
    "strategy": {
        "@misc": "spacy_sam.SaM.v1",
        "n_experts": 3,
        "lead": LEAD,
        "selectors": {
            "similarity": {"@misc": "spacy_sam.DomainSimilarity.v1"},
            "sampling": {"@misc": "spacy_sam.SamplingEvaluation.v1", "sample_size": 10},
        },
        "merge": {"@misc": "spacy_sam.TIES.v1", "density": DENSITY, "scale": SCALE},
    },
    "engine": {
        "@misc": "spacy_sam.TorchEngine.v1",
        "device": None,
        "dtype": None,
        "max_new_tokens": 320,
        "tokens_per_batch": 8192,
        "local_files_only": False,
        "constrained": True,
        "entity_bias": None,
        "cache_bytes": 1 << 30,
        "cache_dir": None,
        "cache_dir_bytes": 1 << 36,
    },
    "selection": "stream",
    "look_ahead": 100,
    "min_docs": 10,
    "encoder": None,
    "window_size": 128,
    "window_overlap": 24,
    "batch_size": 64,
    "threshold": 0.0,
    "calibrated": True,
    "spans_key": SPANS_KEY,
    "annotate_ents": True,
    "ents_filter": None,
    "overwrite": False,
    "save_bank": False,
    "scorer": {"@scorers": "spacy.ner_scorer.v1"},
}


def check_settings(cfg: Dict[str, Any]) -> None:
    """RAISES: SamError S702 for the first setting of a wrong kind. confection does not coerce, so kinds are checked here."""
    whole = {"look_ahead": 1, "min_docs": 1, "window_size": 8, "window_overlap": 0, "batch_size": 1}
    for setting, least in whole.items():
        value = cfg[setting]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SamError("S702", setting=setting, expected=f"a whole number of at least {least}", found=repr(value))
    if cfg["window_overlap"] >= cfg["window_size"]:
        found = f"{cfg['window_overlap']} and {cfg['window_size']}"
        raise SamError("S702", setting="window_overlap", expected="less than window_size", found=found)
    if cfg["selection"] not in MODES:
        raise SamError("S702", setting="selection", expected=f"one of {MODES}", found=repr(cfg["selection"]))
    for setting in ("calibrated", "annotate_ents", "overwrite", "save_bank"):
        if not isinstance(cfg[setting], bool):
            raise SamError("S702", setting=setting, expected="true or false", found=repr(cfg[setting]))
    key = cfg["spans_key"]
    if key is not None and (not isinstance(key, str) or not key):
        raise SamError("S702", setting="spans_key", expected="a name, or empty for none", found=repr(key))
    threshold = cfg["threshold"]
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise SamError("S702", setting="threshold", expected="a number between 0 and 1", found=repr(threshold))


class Call(NamedTuple):
    """What holds for one call. plan, labels: None for those of the component."""

    plan: Optional[Plan]
    labels: Optional[Dict[str, str]]
    threshold: float


def read_call(cfg: Dict[str, Any], plan: Optional[Plan], labels: Optional[Labels], threshold: Optional[float]) -> Call:
    """The component's settings and, where given, a call's own.

    RAISES: SamError S702, also for a setting that was changed since; S202 and S203 for labels; S706 if the plan is none.
    """
    check_settings(cfg if threshold is None else {**cfg, "threshold": threshold})
    if plan is not None and not isinstance(plan, Plan):
        raise SamError("S706", found=repr(plan)[:80])
    asked = read_labels(labels) if labels is not None else {}
    return Call(plan, asked or None, cfg["threshold"] if threshold is None else threshold)


def unlike(one: Any, other: Any) -> bool:
    """Whether two values of a setting differ; labels are asked in their order, so that counts."""
    return json.dumps(one) != json.dumps(other)


def read_labels(labels: Labels) -> Dict[str, str]:
    """The words that are asked for each label: a list asks its names, a dict its values.

    RAISES: SamError S202 if it is neither, or two labels ask the same; S203 for a label that cannot be asked.
    """
    if isinstance(labels, str) or not isinstance(labels, (dict, list, tuple)):
        raise SamError("S202", expected="a list of names, or a dict of names and what to ask", found=repr(labels))
    if not isinstance(labels, dict):
        return {label: label for label in check_labels(labels)}
    names, phrases = check_labels(labels), check_labels(labels.values())
    if len(names) != len(phrases) or len(names) != len(labels):
        raise SamError("S202", expected="different names that ask different things", found=repr(labels))
    return dict(zip(names, phrases))
