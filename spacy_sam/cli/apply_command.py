"""`sam apply`: annotate whole corpora."""

from pathlib import Path
from typing import Any, List, Optional

import typer
from wasabi import msg

from .app import BankOption, app, mendable, progress_wanted, split

PROBLEMS = 3  # exit code: finished, with problems that are reported


@app.command("apply")
def apply_cli(
    inputs: List[Path] = typer.Argument(..., help=".jsonl (also .gz, .zst), .parquet, .spacy, .txt, folders."),
    out: Path = typer.Argument(..., help="Folder to write to, or to go on with."),
    format_: str = typer.Option(
        "jsonl", "--format", "-f", help="jsonl, spacy, prodigy, label-studio, doccano or parquet."
    ),
    labels: Optional[str] = typer.Option(None, "--labels", "-l", help="Comma-separated entity types to ask."),
    plan: Optional[Path] = typer.Option(
        None, "--plan", "-p", help="Plan from `sam select`. Default: select on a sample."
    ),
    bank: Optional[Path] = BankOption,
    pipeline: Optional[str] = typer.Option(
        None, "--pipeline", help="Saved pipeline with sam_ner, in place of labels and bank."
    ),
    code: Optional[Path] = typer.Option(
        None, "--code", "-c", help="Python file with registered functions of the pipeline."
    ),
    n_process: Optional[int] = typer.Option(
        None, "--n-process", "-n", min=1, help="Workers. Default: 1, or one a device."
    ),
    device: Optional[str] = typer.Option(None, "--device", "-d", help="cpu, cuda, or several: cuda:0,cuda:1."),
    engine: str = typer.Option("local", help="local (processes) or ray."),
    address: Optional[str] = typer.Option(None, help="Ray cluster. Default: a Ray of its own."),
    sample_size: int = typer.Option(100, min=1, help="Texts from all over the corpus that the plan is selected on."),
    seed: int = typer.Option(0, help="Decides which texts these are."),
    text_field: str = typer.Option("text", help="Where JSONL and Parquet have the text."),
    txt: str = typer.Option("auto", help=".txt: lines or files. auto: files in folders, lines if named."),
    shard_size: Optional[float] = typer.Option(None, min=0.000001, help="Divide larger .jsonl and .txt; in MB."),
    max_length: Optional[int] = typer.Option(None, min=1, help="Longest document, in characters (spaCy: 1,000,000)."),
    retries: int = typer.Option(2, min=0, help="For a shard over which a worker died."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what other settings or inputs left in OUT."),
) -> None:
    """Annotate whole corpora by one plan. Run it again to go on. Exit codes: 0 done, 1 error, 2 usage, 3 done with problems.

    Example: python -m spacy sam apply corpus/ annotated/ -l politician,election -n 4
    """
    from ..plan import Plan
    from ..scale.job import PipelineSpec
    from ..scale.run import Settings

    with mendable():
        _check(pipeline, labels, bank, txt)
        asked = tuple(split(labels))
        if plan and not asked and not pipeline:
            asked = Plan.from_disk(plan).labels
        settings = Settings(
            spec=PipelineSpec(
                pipeline=pipeline,
                labels=asked,
                bank=str(bank.resolve()) if bank else None,
                code=str(code.resolve()) if code else None,
                max_length=max_length,
            ),
            format=format_,
            plan=plan,
            sample_size=sample_size,
            seed=seed,
            text_field=text_field,
            txt=txt,
            shard_size=int(shard_size * 1e6) or 1 if shard_size else None,
            engine=engine,
            n_process=n_process,
            devices=tuple(split(device)),
            address=address,
            retries=retries,
            overwrite=overwrite,
        )
        summary = _run(inputs, out, settings)
    _print_summary(summary, out)
    if not summary.all_well:
        raise typer.Exit(PROBLEMS)


def _check(pipeline: Optional[str], labels: Optional[str], bank: Optional[Path], txt: str) -> None:
    from ..errors import SamError

    if pipeline and (labels or bank):
        raise SamError("S802", problem="--pipeline has labels and a bank of its own: leave out --labels and --bank.")
    if txt not in ("auto", "lines", "files"):
        raise SamError("S802", problem=f"Unknown --txt '{txt}'. Use auto, lines or files.")


def _run(inputs: List[Path], out: Path, settings: Any) -> Any:
    from ..scale.progress import Progress
    from ..scale.run import apply_corpus

    progress = Progress(bar=progress_wanted(), say=typer.echo)

    def start(shards: List[Any], todo: List[Any]) -> None:
        done = len(shards) - len(todo)
        msg.info(f"Shards: {len(shards)}" + (f", {done} of them finished before" if done else ""))
        progress.start(todo)

    try:
        return apply_corpus(inputs, out, settings, tally=progress.tally, on_start=start)
    except KeyboardInterrupt:
        msg.warn("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None
    finally:
        progress.close()


def _print_summary(summary: Any, out: Path) -> None:
    for number, spec in enumerate(summary.plan.task_models, 1):
        msg.text(f"Task model {number}: {spec.name}")
    counts = f"{summary.documents} documents, {summary.entities} entities in {summary.shards} shards"
    if summary.all_well:
        msg.good(f"{counts}: {out}")
        return
    msg.warn(f"{counts}: {out}")
    typer.echo(
        f"Problems: {summary.malformed} malformed lines, {summary.failed} documents that failed, "
        f"{summary.unreadable} shards not done. They are listed in {summary.problems}."
    )
