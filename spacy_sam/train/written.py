"""Corpora written as text: blocks of sentences with inline marks, each block annotated in full for types of its own.

## viticulture | trade magazine
types: grape variety; winery; harvest month
[Cascina Fontana|winery] picked its [Nebbiolo|grape variety] in late [October|harvest month].
"""

import json
import random
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Iterable, Iterator, List, Sequence, Set, Tuple

from ..corpora import Entity, Record, read_lines
from ..errors import SamError

HEAD, TYPES = "## ", "types:"
MARK = re.compile(r"\[([^\[\]|]*)\|([^\[\]|]*)\]")
HELD_OUT = 20
JOINED = (50, 30, 20)  # how often 1, 2 or 3 sentences make a text
ALL, SOME = (
    0.4,
    0.45,
)  # how often all types of a block are asked, and how often present and absent ones; else only absent ones
NAME_CASES = (80, 8, 4, 8)  # how often type names are as written, Capitalised, In Title Case, IN_CAPITALS
TEXT_CASES = (86, 12, 2)  # how often a text is as written, in lower case, in capitals


@dataclass(frozen=True)
class Block:
    """Sentences of one subject and style. `types` were looked for in every one: what is not marked is none of them."""

    subject: str
    types: Tuple[str, ...]
    records: Tuple[Record, ...]


def read_blocks(path: Path) -> List[Block]:
    """Read a file of blocks.

    RETURNS (List[Block]): In file order; each record has its block's types as `labels`.
    RAISES: SamError S602 if there is no such file, S603 (with the line) if it is malformed.
    """
    if not path.is_file():
        raise SamError("S602", path=path)
    return list(_blocks(path, read_lines(path)))


def _blocks(path: Path, lines: Iterable[Tuple[int, str]]) -> Iterator[Block]:
    subject, types, records = "", _types(""), []  # type: ignore[var-annotated]
    for number, line in ((number, line.strip()) for number, line in lines):
        try:
            if line.startswith(HEAD):
                if records:
                    yield Block(subject, types, tuple(records))
                subject, types, records = line.removeprefix(HEAD), _types(""), []
            elif line.startswith(TYPES):
                types = _types(line)
            elif line:
                records.append(_record(line, types))
        except ValueError as error:
            raise SamError("S603", path=path, line=number, problem=error) from error
    if records:
        yield Block(subject, types, tuple(records))


def _types(line: str) -> Tuple[str, ...]:
    types = tuple(name.strip() for name in line.removeprefix(TYPES).split(";") if name.strip())
    if len(set(types)) < len(types):
        raise ValueError("a type is named twice")
    return types


def _record(line: str, types: Tuple[str, ...]) -> Record:
    if not types:
        raise ValueError(f"a sentence without a line '{TYPES} ...' above it")
    text, end = "", 0
    entities: List[Entity] = []
    for match in MARK.finditer(line):
        surface, label = match.groups()
        if label not in types:
            raise ValueError(f"type {label!r} is not in the block's list")
        if not surface or surface != surface.strip():
            raise ValueError(f"{match[0]!r} is empty, or begins or ends with a space")
        text += line[end : match.start()]
        entities.append((len(text), len(text) + len(surface), label))
        text += surface
        end = match.end()
    text += line[end:]
    if set("[]|") & set(text):
        raise ValueError("a bracket or bar that is not part of a mark [words|type]")
    return Record(text, tuple(entities), types)


def make_written(blocks: Sequence[Block], n_records: int, seed: int) -> Iterator[Record]:
    """Draw what is asked of which sentences: alone or a few of a block together, all of its types, some, or absent ones.

    Absent types are the block's own, which were looked for, or rare ones of other blocks, which no sentence here is likely to
    have. Every sentence is used before one is used again.

    blocks (Sequence[Block]): At least one.
    n_records (int): How many records to make.
    seed (int): The same seed and blocks make the same records.
    RETURNS (Iterator[Record]): The records, one by one.
    RAISES: SamError S606 if there are no blocks.
    """
    if not blocks:
        raise SamError("S606", names="the written corpus", reason="it has no blocks")
    return islice(_endless(blocks, random.Random(seed)), n_records)


def is_held_out(block: Block) -> bool:
    """Whether a block belongs to the dev set: one subject of twenty, by its name, in all its styles."""
    return zlib.crc32(block.subject.split("|")[0].strip().encode()) % HELD_OUT == 0


def held_out_records(blocks: Iterable[Block]) -> Iterator[Record]:
    """The dev set: the sentences of held-out blocks, each asked all types of its block."""
    return (record for block in blocks if is_held_out(block) for record in block.records)


def write_records(records: Iterable[Record], path: Path) -> None:
    """Write records as JSONL: `{"text", "entities": [[start, end, label], ...], "labels": [...]}`."""
    with path.open("w", encoding="utf8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def _endless(blocks: Sequence[Block], rng: random.Random) -> Iterator[Record]:
    seen = Counter(name for block in blocks for name in block.types)
    rare = [(name, block) for block in blocks for name in block.types if seen[name] == 1]
    while True:
        passages = [(block, text) for block in blocks for text in _passages(block.records, rng)]
        rng.shuffle(passages)
        for block, passage in passages:
            foreign = [name for name, other in rng.sample(rare, min(len(rare), 4)) if other is not block]
            labels = _asked(block.types, {label for *_, label in passage.entities}, foreign, rng)
            yield _written_differently(passage, labels, rng)


def _passages(records: Sequence[Record], rng: random.Random) -> Iterator[Record]:
    """The sentences in random order, one to three together."""
    left = rng.sample(records, len(records))
    while left:
        text = ""
        entities: List[Entity] = []
        for _ in range(min(len(left), rng.choices((1, 2, 3), JOINED)[0])):
            record = left.pop()
            text += " " if text else ""
            entities += [(start + len(text), end + len(text), label) for start, end, label in record.entities]
            text += record.text
        yield Record(text, tuple(entities))


def _asked(types: Sequence[str], present: Set[str], foreign: Sequence[str], rng: random.Random) -> List[str]:
    here = sorted(present)
    absent = [name for name in types if name not in present]
    luck = rng.random()
    if luck < ALL or not here:
        asked, n_foreign = list(types), rng.randint(0, 2)
    elif luck < ALL + SOME or not absent:
        asked = rng.sample(here, rng.randint(1, len(here))) + rng.sample(absent, rng.randint(0, min(4, len(absent))))
        n_foreign = rng.randint(0, 4)
    else:
        asked, n_foreign = rng.sample(absent, rng.randint(1, min(4, len(absent)))), rng.randint(0, 4)
    asked += foreign[:n_foreign]
    return rng.sample(asked, len(asked))


def _written_differently(record: Record, labels: Sequence[str], rng: random.Random) -> Record:
    """With other letter case in some texts and all type names of some prompts, as users write them."""
    name = rng.choices((str, str.capitalize, str.title, _constant), NAME_CASES)[0]
    names = {label: name(label) for label in labels}
    if len(set(names.values())) < len(names):
        names = {label: label for label in labels}
    text = rng.choices((str, str.lower, str.upper), TEXT_CASES)[0](record.text)
    text = text if len(text) == len(record.text) else record.text
    entities = tuple((start, end, names[label]) for start, end, label in record.entities if label in names)
    return Record(text, entities, tuple(names[label] for label in labels))


def _constant(name: str) -> str:
    return name.upper().replace(" ", "_")
