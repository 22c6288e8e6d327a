"""Check annotated corpora, count them, and convert them into spaCy's DocBins.

python scripts/prepare.py assets/demo runs/demo/corpora
python scripts/prepare.py DATA runs/bank --check --files sources/*/*.jsonl targets/*.jsonl
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Sequence

import spacy
from spacy.language import Language
from spacy.tokens import DocBin
from wasabi import msg

from spacy_sam.corpora import CONLL_SUFFIXES, Record, read_records
from spacy_sam.errors import SamError
from spacy_sam.evaluate import gold_doc

SUFFIXES = (".jsonl", ".spacy", *CONLL_SUFFIXES)
COUNTS_FILE = "counts.json"


def find_corpora(folder: Path, patterns: Sequence[str]) -> List[Path]:
    """Corpora of a folder, sorted. RAISES: SamError S602 if a pattern finds none."""
    found: List[Path] = []
    for pattern in patterns:
        files = [path for path in folder.glob(pattern) if path.suffix in SUFFIXES and path.is_file()]
        if not files:
            raise SamError("S602", path=folder / pattern)
        found += files
    return sorted(set(found))


def count(path: Path, records: Sequence[Record]) -> Dict[str, Any]:
    """What is in a corpus, and the hash of its file: whoever depends on the counts notices any change of the data."""
    labels = Counter(label for record in records for _, _, label in record.entities)
    return {
        "texts": len(records),
        "without_entities": sum(not record.entities for record in records),
        "entities": sum(labels.values()),
        "labels": dict(sorted(labels.items())),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def write_docbin(nlp: Language, records: Sequence[Record], path: Path) -> int:
    """Write a DocBin. Entity-free documents are marked as annotated, too.

    RETURNS (int): Entities that were left out for an overlap, or widened to whole tokens.
    """
    docs = [gold_doc(nlp, record) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    DocBin(docs=docs).to_disk(path)
    return sum(
        len(set(record.entities) - {(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents})
        for record, doc in zip(records, docs)
    )


def prepare(folder: Path, out: Path, patterns: Sequence[str], check_only: bool) -> Dict[str, Dict[str, Any]]:
    """Read and count every corpus; write DocBins unless `check_only`, and `counts.json` when all went well.

    RAISES: SamError S602 or S603 (with file and line) for data that cannot be read.
    """
    nlp = spacy.blank("en")
    counts: Dict[str, Dict[str, Any]] = {}
    for path in find_corpora(folder, patterns):
        name = path.relative_to(folder).with_suffix("").as_posix()
        records = read_records(path)
        counts[name] = count(path, records)
        if not check_only:
            counts[name]["moved"] = write_docbin(nlp, records, (out / name).with_name(f"{path.stem}.spacy"))
    out.mkdir(parents=True, exist_ok=True)
    (out / COUNTS_FILE).write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    return counts


def print_counts(counts: Dict[str, Dict[str, Any]]) -> None:
    rows = [
        (name, c["texts"], c["without_entities"], c["entities"], c.get("moved", "-"), len(c["labels"]))
        for name, c in counts.items()
    ]
    header = ("corpus", "texts", "without entities", "entities", "moved", "types")
    msg.table(rows, header=header, divider=True, aligns=("l", *["r"] * 5))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with .jsonl, .spacy or CoNLL corpora")
    parser.add_argument("out", type=Path, help="folder for the DocBins and counts.json")
    parser.add_argument("--files", nargs="+", default=["**/*"], metavar="PATTERN", help="what to read in the folder")
    parser.add_argument("--check", action="store_true", help="write no DocBins, only counts.json")
    options = parser.parse_args(arguments)
    try:
        counts = prepare(options.folder, options.out, options.files, options.check)
    except SamError as error:
        msg.fail(str(error), exits=1)
    print_counts(counts)
    msg.good(f"{len(counts)} corpora: {options.out / COUNTS_FILE}")


if __name__ == "__main__":
    main(sys.argv[1:])
