"""What there is to say about a bank and its experts, as plain data (for JSON) and as tables (for the terminal and HTML)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from .bank import ExpertBank
from .merge.insight import Profile, profile
from .plan import Expert, to_json

MAX_TYPES = 15  # of an expert, where all experts are listed


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; without a header, of facts. `aligns` is "l" or "r" for each column."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    aligns: str = ""


@dataclass(frozen=True)
class Overview:
    """Tables to read, and the same as JSON types."""

    title: str
    tables: Sequence[Table]
    data: Dict[str, Any] = field(default_factory=dict)


def bank_overview(bank: ExpertBank) -> Overview:
    """The bank and its experts, baselines last. Weights are not read."""
    cards = [*bank.experts, *bank.baselines]
    base, revision = _base(bank)
    facts = [
        ("base", f"{base}, revision {revision}" if revision else base),
        ("base hash", bank.base_hash),
        ("prompt format", _prompt(bank.prompt)),
        ("encoder", bank.encoder),
        ("entity bias", f"{bank.entity_bias:g}"),
        ("experts", f"{len(bank.experts)}, and {len(bank.baselines)} for comparison"),
    ]
    rows = [
        (
            card.name,
            card.domain if card.role == "expert" else f"{card.domain} ({card.role})",
            str(len(card.labels)),
            str(sum(corpus.n_records for corpus in card.corpora)),
            _percent(mean_score(card)),
            ", ".join(corpus.name for corpus in card.corpora),
        )
        for card in cards
    ]
    tables = [
        Table(f"Bank {bank.name}", facts),
        Table("Experts", rows, ("name", "domain", "types", "records", "dev F1", "corpora"), "llrrrl"),
        Table("Types", [(card.name, _first(card.labels)) for card in cards], ("name", "types"), "ll"),
    ]
    data = {
        "name": bank.name,
        "base": base,
        "revision": revision,
        "base_hash": bank.base_hash,
        "prompt": bank.prompt,
        "encoder": bank.encoder,
        "entity_bias": bank.entity_bias,
        "details": bank.details,
        "experts": [{**_card(bank, card), "mean_dev_f": mean_score(card)} for card in cards],
    }
    return Overview(f"Bank {bank.name}", tables, data)


def expert_overview(bank: ExpertBank, name: str) -> Overview:
    """An expert's card and what its adapter changes.

    RAISES: SamError S108 if there is no such expert, S106 or S107 if its adapter cannot be merged or is damaged.
    """
    card = bank[name]
    profiles = profile(bank.load_adapter(name))
    centroid = card.centroid
    facts = [
        ("domain", card.domain),
        ("role", card.role),
        ("content hash", bank.adapter_hash(name)),
        ("base hash", card.base_hash),
        ("prompt format", _prompt(card.prompt)),
        ("lora", _settings(card.lora)),
        ("centroid", f"{centroid.n_texts} texts, {centroid.encoder}" if centroid else "none"),
        ("training", _settings(card.training)),
    ]
    corpora = [(corpus.name, str(corpus.n_records), ", ".join(corpus.labels)) for corpus in card.corpora]
    scores = [(n, *map(_percent, (s.p, s.r, s.f)), str(s.n_docs)) for n, s in card.scores.items()]
    if len(scores) > 1:
        scores.append(("mean", "", "", _percent(mean_score(card)), ""))
    modules = [
        (p.kind, str(p.n_matrices), _ranks(p), str(p.n_parameters), f"{p.norm:.3g}", ", ".join(p.modules))
        for p in profiles
    ]
    header = ("part", "matrices", "rank", "parameters", "norm", "modules")
    tables = [
        Table(f"Expert {name}", facts),
        Table(f"{len(card.labels)} types", [(", ".join(card.labels),)]),
        Table("Corpora", corpora, ("corpus", "records", "types"), "lrl"),
        Table("Scores on dev sets, percent", scores, ("dev set", "P", "R", "F1", "docs"), "lrrrr"),
        Table("What it changes (norm: Frobenius norm of the weight change)", modules, header, "lrrrrl"),
    ]
    changes = [
        {
            "kind": p.kind,
            "modules": list(p.modules),
            "n_matrices": p.n_matrices,
            "ranks": list(p.ranks),
            "n_parameters": p.n_parameters,
            "norm": p.norm,
        }
        for p in profiles
    ]
    data = {**_card(bank, card), "changes": changes}
    return Overview(f"Expert {name}", [table for table in tables if table.rows], data)


def mean_score(card: Expert) -> Optional[float]:
    """Mean F1 over an expert's dev sets, between 0 and 1."""
    scores = [score.f for score in card.scores.values()]
    return sum(scores) / len(scores) if scores else None


def _card(bank: ExpertBank, card: Expert) -> Dict[str, Any]:
    """The card as JSON types, with the adapter's hash and without the numbers of the centroid."""
    data = to_json(card)
    centroid = data.pop("centroid")
    if centroid:
        del centroid["vector"]
    return {**data, "centroid": centroid, "hash": bank.adapter_hash(card.name)}


def _percent(share: Optional[float]) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _base(bank: ExpertBank) -> Tuple[str, Optional[str]]:
    """As the bank names it: no path of this machine for a base that is inside."""
    base, revision = bank.base
    inside = Path(base).is_relative_to(bank.path)
    return (f"{Path(base).relative_to(bank.path).as_posix()} (a folder of the bank)" if inside else base), revision


def _first(labels: Sequence[str]) -> str:
    """The first types; an expert's own page has all of them."""
    more = len(labels) - MAX_TYPES
    return ", ".join(labels[:MAX_TYPES]) + (f" and {more} more" if more > 0 else "")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "none"


def _prompt(prompt: Mapping[str, Any]) -> str:
    others = {key: value for key, value in prompt.items() if key != "name" and value != ""}
    return f"{prompt.get('name', '')} ({_settings(others)})" if others else str(prompt.get("name", ""))


def _ranks(found: Profile) -> str:
    low, high = found.ranks
    return str(low) if low == high else f"{low} to {high}"
