"""Texts of three shapes from the written corpus, and the types that are asked of them."""

import random
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from typing import Dict, Iterator, List

from spacy_sam.train.written import read_blocks

WRITTEN = Path(__file__).parents[1] / "assets" / "written"
SHAPES = {"short": 8, "paragraphs": 8, "forty_labels": 40}  # types asked: those that most blocks of the corpus have
SENTENCES = 6  # of one block that make a paragraph


class Texts:
    """Other texts at every call, so that no engine remembers any of them from one measurement to the next."""

    def __init__(self, written: Path = WRITTEN, seed: int = 0) -> None:
        """written (Path): Folder of the written corpus. seed (int): Decides the order of the texts."""
        blocks = [block for path in sorted(written.glob("*/*.txt")) for block in read_blocks(path)]
        counts = Counter(name for block in blocks for name in block.types)
        self._ranked = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        sentences = [record.text for block in blocks for record in block.records]
        paragraphs = [
            " ".join(record.text for record in block.records[start : start + SENTENCES])
            for block in blocks
            for start in range(0, len(block.records), SENTENCES)
        ]
        rng = random.Random(seed)
        rng.shuffle(sentences)
        rng.shuffle(paragraphs)
        short = cycle(sentences)  # of both shapes, so that they never have the same
        self._streams: Dict[str, Iterator[str]] = {
            "short": short,
            "paragraphs": cycle(paragraphs),
            "forty_labels": short,
        }

    def take(self, shape: str, count: int) -> List[str]:
        """The next texts of a shape."""
        return list(islice(self._streams[shape], count))

    def labels(self, shape: str) -> List[str]:
        """What is asked of texts of a shape."""
        return self._ranked[: SHAPES[shape]]
