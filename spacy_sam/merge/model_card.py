"""The card of a task model: what it was made of, and with what."""

import json
from importlib.metadata import version
from pathlib import Path

from ..bank import ExpertBank
from ..plan import Plan

PACKAGES = ("spacy-sam", "torch", "transformers")


def model_card(bank: ExpertBank, plan: Plan) -> str:
    """The text of `README.md`, with the front matter that model hubs read.

    bank (ExpertBank): The bank.
    plan (Plan): A plan of one task model.
    """
    (spec,) = plan.task_models
    source, revision = bank.base
    is_hub_id = not Path(source).is_dir()
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- spacy-sam", "- token-classification"]
    if is_hub_id:
        lines += [f"base_model: {source}", "base_model_relation: merge"]
    lines += ["---", "", f"# {spec.name}", ""]
    lines += [
        f"A task model of the bank '{bank.name}': base + merged weight changes of its experts, in plain weights.",
        "",
    ]
    lines += ["| expert | domain | weight | hash |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {bank[name].domain} | {weight:g} | {bank.adapter_hash(name)} |"
        for name, weight in zip(spec.experts, spec.weights)
    ]
    base = f"{source}, revision {revision or 'of the hub'}" if is_hub_id else f"'{Path(source).name}'"
    lines += ["", f"- Base: {base}, hash {bank.base_hash}."]
    if len(spec.experts) > 1:
        lines.append(f"- Merge method: `{json.dumps(spec.method or {'@misc': 'spacy_sam.TIES.v1'})}`.")
    elif spec.experts:
        lines.append("- One expert: its weight change is added as it is.")
    if plan.labels:
        lines.append(f"- Selected for the labels: {', '.join(plan.labels)}.")
    lines.append(f"- Plan: `plan.json`, fingerprint {plan.fingerprint}.")
    lines.append(f"- Made with {', '.join(f'{package} {version(package)}' for package in PACKAGES)}.")
    lines.append(f"- Prompt format: `{json.dumps(bank.prompt, ensure_ascii=False)}`.")
    return "\n".join([*lines, ""])
