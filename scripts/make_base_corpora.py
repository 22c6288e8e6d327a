"""Write the corpora that a base learns from before any domain: texts to repeat, silver records out of WordNet, and records
drawn from the written corpus that comes with the project.

python scripts/make_base_corpora.py DATA runs/base --wordnet /usr/share/wordnet --n-silver 200000 --n-copies 20000

Of the source corpora only the texts are read, never the labels. WordNet 3.0 is Debian's package `wordnet-base`.
"""

from pathlib import Path

import typer
from wasabi import msg

from spacy_sam.cli.app import read_all_texts
from spacy_sam.corpora import load_dataset
from spacy_sam.errors import SamError
from spacy_sam.train.silver import SilverRecord, make_copies, make_silver, write_silver
from spacy_sam.train.written import is_held_out, make_written, read_blocks

SOURCES = "sources/*/*.train.jsonl"
NAMES = ("copy", "silver", "written_short", "written", "written_dev")
PARTS = ("short", "long")
FILES = ", ".join(f"{name}.jsonl" for name in NAMES)
WRITTEN = Path(__file__).parents[1] / "assets" / "written"
HINTS = {"S607": "Debian and Ubuntu: apt-get install wordnet-base"}


def write_written(folder: Path, out: Path, n_records: int, seed: int) -> None:
    """Write `written_short.jsonl` from the folder `short`, and `written.jsonl` from this and `long`.

    The held-out subjects go to `written_dev.jsonl` as they are, each sentence asked all its types.
    RAISES: SamError S603 (with file and line) for a file that cannot be read, S606 if there is none.
    """
    short, long = ([b for path in sorted(folder.glob(f"{part}/*.txt")) for b in read_blocks(path)] for part in PARTS)
    write_silver(make_written([b for b in short if not is_held_out(b)], n_records, seed), out / "written_short.jsonl")
    write_silver(make_written([b for b in short + long if not is_held_out(b)], n_records, seed), out / "written.jsonl")
    held_out = [(record, b.types) for b in short + long if is_held_out(b) for record in b.records]
    write_silver((SilverRecord(r.text, r.entities, types) for r, types in held_out), out / "written_dev.jsonl")


def write_corpora(
    data: Path, out: Path, wordnet: Path, written: Path, *, n_silver: int, n_copies: int, n_written: int, seed: int
) -> None:
    """Write all corpora; the same arguments give the same files.

    RAISES: SamError S602, S603 or S801 if there are no texts to read, S606 if none can be used, S607 if there is no WordNet.
    """
    texts = read_all_texts([data / SOURCES])
    silver = make_silver(wordnet, texts, n_silver, seed)
    copies = make_copies(texts, n_copies, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_written(written, out, n_written, seed)
    write_silver(copies, out / "copy.jsonl")
    write_silver(silver, out / "silver.jsonl")
    msg.good(f"{len(texts)} source texts of {data}")


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
    data: Path = typer.Argument(..., help=f"Folder with {SOURCES}."),
    out: Path = typer.Argument(..., help=f"Folder for {FILES}."),
    wordnet: Path = typer.Option(Path("/usr/share/wordnet"), help="Folder of WordNet 3.0 with data.noun."),
    written: Path = typer.Option(WRITTEN, help="Folder of the written corpus."),
    n_silver: int = typer.Option(200_000, min=1, help="Records of silver.jsonl."),
    n_copies: int = typer.Option(20_000, min=1, help="Records of copy.jsonl."),
    n_written: int = typer.Option(150_000, min=1, help="Records of written.jsonl."),
    seed: int = typer.Option(0, help="The same seed, texts and WordNet give the same files."),
) -> None:
    """Write the corpora of a base's training."""
    sizes = {"n_silver": n_silver, "n_copies": n_copies, "n_written": n_written}
    try:
        write_corpora(data, out, wordnet, written, **sizes, seed=seed)
    except SamError as error:
        msg.fail(str(error), HINTS.get(error.code, ""), exits=1)
    print_counts(out)


if __name__ == "__main__":
    typer.run(main)
