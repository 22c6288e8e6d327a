"""Write the corpora that a base learns from before any domain: records drawn from the written corpus that comes with the project.

python scripts/make_base_corpora.py runs/base
"""

from pathlib import Path

import typer
from wasabi import msg

from spacy_sam.corpora import load_dataset
from spacy_sam.errors import SamError
from spacy_sam.train.written import held_out_records, is_held_out, make_written, read_blocks, write_records

NAMES = ("written", "written_dev")
FILES = ", ".join(f"{name}.jsonl" for name in NAMES)
WRITTEN = Path(__file__).parents[1] / "assets" / "written"


def write_corpora(written: Path, out: Path, *, n_records: int, seed: int) -> None:
    """Write all corpora; the same arguments give the same files.

    The held-out subjects go to `written_dev.jsonl` as they are, each sentence asked all its types.
    RAISES: SamError S603 (with file and line) for a file that cannot be read, S606 if there is none.
    """
    blocks = [block for path in sorted(written.glob("*/*.txt")) for block in read_blocks(path)]
    records = make_written([block for block in blocks if not is_held_out(block)], n_records, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_records(records, out / "written.jsonl")
    write_records(held_out_records(blocks), out / "written_dev.jsonl")


def print_counts(out: Path) -> None:
    """Read the corpora as the training does, and print what is in them."""
    rows = []
    for name in NAMES:
        dataset = load_dataset(out / f"{name}.jsonl")
        sizes = [len(record.entities) for record in dataset.records]
        rows.append((f"{name}.jsonl", len(sizes), sizes.count(0), sum(sizes), len(dataset.labels)))
    header = ("corpus", "records", "without entities", "entities", "types")
    msg.table(rows, header=header, divider=True, aligns=("l", *["r"] * 4))


def main(
    out: Path = typer.Argument(..., help=f"Folder for {FILES}."),
    written: Path = typer.Option(WRITTEN, help="Folder of the written corpus."),
    n_records: int = typer.Option(200_000, min=1, help="Records of written.jsonl."),
    seed: int = typer.Option(0, help="The same seed and corpus give the same files."),
) -> None:
    """Write the corpora of a base's training."""
    try:
        write_corpora(written, out, n_records=n_records, seed=seed)
    except SamError as error:
        msg.fail(str(error), exits=1)
    print_counts(out)


if __name__ == "__main__":
    typer.run(main)
