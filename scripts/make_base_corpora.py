"""Write the two corpora that a base learns from before any domain: texts to repeat, and silver records out of WordNet.

python scripts/make_base_corpora.py DATA runs/base --wordnet /usr/share/wordnet --n-silver 200000 --n-copies 20000

Of the source corpora only the texts are read, never the labels. WordNet 3.0 is Debian's package `wordnet-base`.
"""

from pathlib import Path

import typer
from wasabi import msg

from spacy_sam.cli.app import read_all_texts
from spacy_sam.corpora import load_dataset
from spacy_sam.errors import SamError
from spacy_sam.train.silver import make_copies, make_silver, write_silver

SOURCES = "sources/*/*.train.jsonl"
HINTS = {"S607": "Debian and Ubuntu: apt-get install wordnet-base"}


def write_corpora(data: Path, out: Path, wordnet: Path, n_silver: int, n_copies: int, seed: int) -> None:
    """Write `copy.jsonl` and `silver.jsonl`; the same arguments give the same files.

    RAISES: SamError S602, S603 or S801 if there are no texts to read, S606 if none can be used, S607 if there is no WordNet.
    """
    texts = read_all_texts([data / SOURCES])
    silver = make_silver(wordnet, texts, n_silver, seed)
    copies = make_copies(texts, n_copies, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_silver(copies, out / "copy.jsonl")
    write_silver(silver, out / "silver.jsonl")
    msg.good(f"{len(texts)} source texts of {data}")


def print_counts(out: Path) -> None:
    """Read the corpora as the training does, and print what is in them."""
    rows = []
    for name in ("copy", "silver"):
        dataset = load_dataset(out / f"{name}.jsonl")
        sizes = [len(record.entities) for record in dataset.records]
        rows.append((f"{name}.jsonl", len(sizes), sizes.count(0), sum(sizes), len(dataset.labels)))
    header = ("corpus", "records", "without entities", "entities", "types")
    msg.table(rows, header=header, divider=True, aligns=("l", *["r"] * 4))


def main(
    data: Path = typer.Argument(..., help=f"Folder with {SOURCES}."),
    out: Path = typer.Argument(..., help="Folder for copy.jsonl and silver.jsonl."),
    wordnet: Path = typer.Option(Path("/usr/share/wordnet"), help="Folder of WordNet 3.0 with data.noun."),
    n_silver: int = typer.Option(200_000, min=1, help="Records of silver.jsonl."),
    n_copies: int = typer.Option(20_000, min=1, help="Records of copy.jsonl."),
    seed: int = typer.Option(0, help="The same seed, texts and WordNet give the same files."),
) -> None:
    """Write the corpora of a base's first training: OUT/copy.jsonl and OUT/silver.jsonl."""
    try:
        write_corpora(data, out, wordnet, n_silver, n_copies, seed)
    except SamError as error:
        msg.fail(str(error), HINTS.get(error.code, ""), exits=1)
    print_counts(out)


if __name__ == "__main__":
    typer.run(main)
