"""Write the corpora of the small causal bank that throughput is measured on: records drawn from the written corpus.

python scripts/make_causal_corpora.py runs/causal/corpora
python -m spacy sam train configs/causal.cfg runs/causal/bank --no-score
"""

from itertools import chain
from pathlib import Path
from typing import List, Sequence

import typer
from wasabi import msg

from spacy_sam.corpora import Record
from spacy_sam.errors import SamError
from spacy_sam.prompts import InlineFormat
from spacy_sam.train.written import make_written, read_blocks, write_records

WRITTEN = Path(__file__).parents[1] / "assets" / "written"
BASE = "*/*.txt"
# The files of the written corpus that each expert is trained on.
EXPERTS = {
    "encyclopedia": "common/ce*.txt",
    "fiction": "common/cf*.txt",
    "legal": "common/cl*.txt",
    "news": "common/cn*.txt",
    "science": "common/cs*.txt",
    "social_media": "common/cm*.txt",
}


def write_corpora(written: Path, out: Path, *, n_records: int, seed: int) -> List[Path]:
    """Write `written.jsonl` for the base, `vocabulary.jsonl` for its tokens, and for each expert a tenth as many records.

    The same arguments give the same files. RETURNS (List[Path]): What was written.
    RAISES: SamError S603 (with file and line) for a file that cannot be read, S606 if there is none.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = draw(written, BASE, n_records, seed)
    files = {"written": base, "vocabulary": list(with_answers(base))}
    files |= {name: draw(written, pattern, max(1, n_records // 10), seed) for name, pattern in EXPERTS.items()}
    for name, records in files.items():
        write_records(records, out / f"{name}.jsonl")
    return [out / f"{name}.jsonl" for name in files]


def draw(written: Path, pattern: str, count: int, seed: int) -> List[Record]:
    """Records of some files of the written corpus."""
    blocks = [block for path in sorted(written.glob(pattern)) for block in read_blocks(path)]
    return list(make_written(blocks, count, seed))


def with_answers(records: Sequence[Record]) -> chain:
    """Texts and their answers, so that a mark becomes one token and not the bytes of a character that no text has."""
    answers = (InlineFormat().answer(record.text, record.entities) for record in records)
    return chain(records, (Record(answer, (), ()) for answer in answers))


def main(
    out: Path = typer.Argument(..., help="Folder for the corpora."),
    written: Path = typer.Option(WRITTEN, help="Folder of the written corpus."),
    n_records: int = typer.Option(20_000, min=1, help="Records of written.jsonl."),
    seed: int = typer.Option(0, help="The same seed and corpus give the same files."),
) -> None:
    """Write the corpora."""
    try:
        for path in write_corpora(written, out, n_records=n_records, seed=seed):
            print(path)
    except SamError as error:
        msg.fail(str(error), exits=1)


if __name__ == "__main__":
    typer.run(main)
