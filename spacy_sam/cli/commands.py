"""The commands. Each one reads its arguments, calls the package, prints."""

import json
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional

import typer
from wasabi import msg

from ..errors import SamError
from ..settings import DENSITY, SCALE
from .app import (
    BankOption,
    app,
    engine_on,
    find_files,
    mendable,
    progress_wanted,
    read_all_texts,
    read_overrides,
    split,
    write_text,
)

LabelsOption = typer.Option(None, "--labels", "-l", help="Comma-separated entity types to ask.")
DeviceOption = typer.Option(None, "--device", "-d", help="cpu, cuda, cuda:1, mps. Default: the best there is.")
NumberOption = typer.Option(3, min=1, help="Experts of a task model.")
DensityOption = typer.Option(DENSITY, min=0.0, max=1.0, help="TIES: share of each task vector that is kept.")
ScaleOption = typer.Option(SCALE, help="TIES: factor of the merged task vector.")


class Form(str, Enum):
    """What a task model is written as."""

    MODEL = "model"
    ADAPTER = "adapter"


@app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_cli(
    ctx: typer.Context,
    config: Path = typer.Argument(..., help="Training config (.cfg)."),
    out: Path = typer.Argument(..., help="Folder of the bank to write, or to go on with."),
    score: bool = typer.Option(True, help="Score each expert on its dev sets afterwards."),
) -> None:
    """Train a bank: a base if the config builds one, an expert for each domain, the unified baseline.

    Example: python -m spacy sam train configs/bank.cfg bank --paths.data DATA
    """
    from ..train.config import read_config
    from ..train.run import is_main_process, train_bank
    from ..train.scores import score_bank

    overrides = read_overrides(ctx.args)
    with mendable():
        settings = read_config(config, overrides)
        bank = train_bank(settings, out, progress=progress_wanted(), report=msg.info)
        if not is_main_process():
            return
        if score:
            score_bank(bank, settings, report=msg.info)
        msg.good(f"Bank with {len(bank)} experts: {out}")


@app.command("select")
def select_cli(
    texts: List[Path] = typer.Argument(..., help="Sample of the corpus: .jsonl, .spacy or .txt (a text a line)."),
    out: Optional[Path] = typer.Option(None, "--output", "-o", help="Write the plan here (JSON)."),
    bank: Optional[Path] = BankOption,
    labels: Optional[str] = LabelsOption,
    n_experts: int = NumberOption,
    density: float = DensityOption,
    scale: float = ScaleOption,
    device: Optional[str] = DeviceOption,
) -> None:
    """Rank the bank's experts for a corpus and make the plan.

    Example: python -m spacy sam select corpus.jsonl -l politician,election -o plan.json
    """
    from ..evaluate import make_pipeline, sam
    from ..registered import make_ties

    with mendable():
        _, component = make_pipeline(bank, split(labels), engine=engine_on(device))
        component.parts.strategy = sam(make_ties(density, scale), n_experts)
        plan = component.select(read_all_texts(texts))
        for selection in plan.selections:
            msg.divider(selection.selector)
            rows = [
                (name, f"{value:.3f}", "yes" if name in selection.chosen else "") for name, value in selection.scores
            ]
            msg.table(rows, header=("expert", "score", "chosen"), divider=True, aligns=("l", "r", "l"))
        for number, spec in enumerate(plan.task_models, 1):
            msg.text(f"Task model {number}: {spec.name}")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            plan.to_disk(out)
            msg.good(f"Plan {plan.fingerprint}: {out}")


@app.command("merge")
def merge_cli(
    plan: Path = typer.Argument(..., help="Plan from `sam select`."),
    out: Path = typer.Argument(..., help="Folder for the merged models."),
    bank: Optional[Path] = BankOption,
    form: Form = typer.Option(Form.MODEL, "--as", help="Whole models, or PEFT adapters (merges of low rank only)."),
    pad_rank: bool = typer.Option(False, "--pad-rank", help="Adapters: fill the rank up to a max_lora_rank of vLLM."),
    dtype: Optional[str] = typer.Option(
        None, help="Models: float32, bfloat16, float16. Default: as the base is stored."
    ),
    max_shard_size: float = typer.Option(5.0, min=0.000001, help="Models: gigabytes of weights in a file."),
) -> None:
    """Write each task model of a plan: as a model folder that transformers loads, or as an adapter of the base.

    Example: python -m spacy sam merge plan.json merged/
    """
    import torch

    from ..bank import ExpertBank, bundled_bank_path
    from ..generate.devices import resolve_dtype
    from ..merge.adapter_export import write_task_adapters
    from ..merge.export import write_task_models
    from ..plan import Plan
    from ..registered import resolve_method

    with mendable():
        opened = ExpertBank(bank or bundled_bank_path())
        if form is Form.ADAPTER:
            for folder, spec in write_task_adapters(opened, Plan.from_disk(plan), out, resolve_method, pad_rank):
                msg.good(f"{spec.name}: {folder}")
            return
        number_format = resolve_dtype(dtype, torch.device("cpu")) if dtype else None
        n_bytes = int(max_shard_size * 1e9)
        for folder, spec in write_task_models(
            opened, Plan.from_disk(plan), out, resolve_method, n_bytes, number_format
        ):
            msg.good(f"{spec.name}: {folder}")


@app.command("evaluate")
def evaluate_cli(
    corpora: List[Path] = typer.Argument(..., help="Annotated .jsonl, .spacy or .conll files; each is one corpus."),
    bank: Optional[Path] = BankOption,
    out: Optional[Path] = typer.Option(None, "--output", "-o", help="Write all scores here (JSON)."),
    limit: Optional[int] = typer.Option(None, "--limit", "-n", min=1, help="First documents of each corpus."),
    rows: str = typer.Option("base,unified,experts,all,sam,eco", help="What to compare."),
    n_experts: int = NumberOption,
    density: float = DensityOption,
    scale: float = ScaleOption,
    exclude: str = typer.Option("", help="Comma-separated types to leave out."),
    per_type: bool = typer.Option(False, help="Print the scores of each type, too."),
    device: Optional[str] = DeviceOption,
) -> None:
    """Strict span scores of the base, the unified baseline, each expert, all merged, SaM and SaM-eco.

    Example: python -m spacy sam evaluate targets/*.test.jsonl -n 100 -o scores.json
    """
    from .. import evaluate as ev
    from ..corpora import read_records
    from ..registered import make_ties

    with mendable():
        wanted = split(rows)
        unknown = sorted(set(wanted) - set(ev.ROWS))
        if unknown:
            raise SamError("S802", problem=f"Unknown rows {unknown} in --rows. Use some of {', '.join(ev.ROWS)}.")
        records = {
            name: ev.exclude(read_records(path)[:limit], split(exclude))
            for name, path in _name_corpora(find_files(corpora)).items()
        }
        nlp, component = ev.make_pipeline(bank, ["any"], engine=engine_on(device))
        table = ev.evaluate(
            nlp,
            component,
            records,
            merge=make_ties(density, scale),
            n_experts=n_experts,
            rows=wanted,
            on_result=_print_result,
        )
        _print_table(ev.to_rows(table))
        if per_type:
            _print_types(table)
        if out:
            write_text(out, json.dumps(ev.to_json(table), indent=2, ensure_ascii=False) + "\n")
            msg.good(f"Scores: {out}")


@app.command("report")
def report_cli(
    texts: List[Path] = typer.Argument(..., help="Documents: .jsonl, .spacy or .txt (a text a line)."),
    out: Path = typer.Argument(..., help="HTML page to write."),
    bank: Optional[Path] = BankOption,
    labels: Optional[str] = LabelsOption,
    plan: Optional[Path] = typer.Option(None, "--plan", "-p", help="Plan from `sam select`. Default: select here."),
    limit: int = typer.Option(50, "--limit", "-n", min=1, help="Documents shown."),
    device: Optional[str] = DeviceOption,
) -> None:
    """Annotate documents and write one HTML page: selection, plan, counts, entities.

    Example: python -m spacy sam report corpus.jsonl page.html -l politician,election
    """
    from ..evaluate import make_pipeline
    from ..plan import Plan
    from ..report import render_report

    with mendable():
        given = Plan.from_disk(plan) if plan else None
        asked = split(labels) or (given.labels if given else ())
        nlp, component = make_pipeline(bank, asked, engine=engine_on(device))
        all_texts = read_all_texts(texts)
        used = given or component.select(all_texts)
        docs = list(component.pipe((nlp.make_doc(text) for text in all_texts[:limit]), plan=used))
        write_text(out, render_report(docs, used))
        msg.good(f"Page with {len(docs)} documents: {out}")


@app.command("demo")
def demo_cli(
    out: Path = typer.Option(Path("sam_demo.html"), "--output", "-o", help="displaCy page to write."),
    bank: Optional[Path] = BankOption,
    device: Optional[str] = DeviceOption,
) -> None:
    """Annotate two small corpora of different domains and show what happens.

    Example: python -m spacy sam demo
    """
    from ..demo import run_demo

    with mendable():
        run_demo(out, bank=bank, device=device)


def _name_corpora(paths: List[Path]) -> Dict[str, Path]:
    """Corpora by file name, or by path where two files have the same name."""
    names = [path.stem for path in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths)}


def _print_result(corpus: str, row: str, result: Any) -> None:
    models = " | ".join(result.task_models)
    msg.text(f"{corpus}: {row}  P {result.p:.3f}  R {result.r:.3f}  F {result.f:.3f}  ({models})")


def _print_table(rows: List[List[str]]) -> None:
    msg.divider("Strict span F1, percent")
    aligns = ("l", *["r"] * (len(rows[0]) - 1))
    msg.table(rows[1:], header=rows[0], divider=True, aligns=aligns)


def _print_types(table: Any) -> None:
    for corpus, results in table.items():
        msg.divider(f"{corpus}: F1 by type, percent")
        types = sorted({label for result in results.values() for label in result.per_type})
        lines = [
            [label, *(f"{100 * r.per_type[label]['f']:.1f}" if label in r.per_type else "-" for r in results.values())]
            for label in types
        ]
        msg.table(lines, header=["type", *results], divider=True, aligns=("l", *["r"] * len(results)))
