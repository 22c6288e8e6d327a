"""The README of an exported adapter: what it was made of, and how it is used."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import List, Mapping, Sequence

import torch

from .. import __version__
from ..adapters import LoraFactors
from ..bank import ExpertBank
from ..plan import Plan, TaskModelSpec


def adapter_card(
    bank: ExpertBank,
    plan: Plan,
    spec: TaskModelSpec,
    factors: Mapping[str, LoraFactors],
    rank: int,
    vllm_ranks: Sequence[int],
) -> str:
    """Markdown with the front matter that model hubs read.

    bank (ExpertBank), plan (Plan), spec (TaskModelSpec): What the adapter was made from.
    factors (Mapping[str, LoraFactors]): What is in it, before padding.
    rank (int): The adapter's own.
    vllm_ranks (Sequence[int]): What vLLM takes for `max_lora_rank`, in ascending order.
    RETURNS (str): The card's text.
    """
    base, revision = bank.base
    local = Path(base).is_dir()
    named = (
        f"a folder, `{Path(base).name}`" if local else f"`{base}`" + (f", revision `{revision}`" if revision else "")
    )
    ranks = sorted({len(each.a) for each in factors.values()})
    method = f"`{json.dumps(spec.method)}`" if spec.method else "none: a single expert"
    padded = "" if ranks == [rank] else f" (of the matrices: {ranks[0]} to {ranks[-1]}, padded with zeros)"
    facts = [
        ("base", f"{named}, hash `{bank.base_hash}`"),
        ("bank", bank.name),
        ("merge method", method),
        ("rank", f"{rank}{padded}"),
        ("matrices", str(len(factors))),
        ("prompt format", f"`{json.dumps(bank.prompt)}`"),
        ("plan", f"`{plan.fingerprint}`, task model `{spec.fingerprint}`"),
        ("made with", f"spacy-sam {__version__}, peft {version('peft')}, torch {torch.__version__}"),
    ]
    lines = [
        *_front_matter(None if local else base),
        f"# {spec.name}",
        "",
        "A task model for named entity recognition as a LoRA adapter: base + adapter is the task model, exactly.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in facts),
        "",
        "## Experts",
        "",
        "| expert | domain | weight | content hash | corpora |",
        "|---|---|---:|---|---|",
        *_experts(bank, spec),
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        *_vllm(rank, vllm_ranks),
        "",
        "The prompts must be those of the prompt format above: this package makes them (`spacy_sam.prompts.make_format`).",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(base: "str | None") -> List[str]:
    named = [f"base_model: {json.dumps(base)}"] if base else []
    return [
        "---",
        "library_name: peft",
        *named,
        "tags: [lora, model-merging, named-entity-recognition, spacy-sam]",
        "---",
        "",
    ]


def _experts(bank: ExpertBank, spec: TaskModelSpec) -> List[str]:
    rows = []
    for name, weight in zip(spec.experts, spec.weights):
        card = bank[name]
        corpora = ", ".join(corpus.name for corpus in card.corpora)
        cells = (name, card.domain, f"{weight:g}", f"`{bank.adapter_hash(name)}`", corpora)
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    return rows


def _vllm(rank: int, vllm_ranks: Sequence[int]) -> List[str]:
    step = next((step for step in vllm_ranks if step >= rank), None)
    if step is None:
        return ["", f"vLLM takes adapters of rank up to {vllm_ranks[-1]}: it cannot serve this one."]
    return ["", f"vLLM serves it beside a causal base with `--enable-lora --max-lora-rank {step}`."]


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or row."""
    return " ".join(text.replace("|", "\\|").split())
