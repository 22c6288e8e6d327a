"""Annotated corpora in: JSONL, DocBin and CoNLL files to records."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from .errors import SamError

Entity = Tuple[int, int, str]
CONLL_SUFFIXES = (".conll", ".bio", ".iob")
IOB_TAG = re.compile(r"O|[BI]-.+")


@dataclass(frozen=True)
class Record:
    """One annotated text: `entities` are (start, end, label) in characters, sorted.

    labels: The types that were looked for in this text, where they differ from text to text; None for the corpus's.
    """

    text: str
    entities: Tuple[Entity, ...] = ()
    labels: Optional[Tuple[str, ...]] = None


@dataclass(frozen=True)
class Dataset:
    """The records of one corpus and the types that its annotators looked for (present in a record or not)."""

    name: str
    records: Tuple[Record, ...]
    labels: Tuple[str, ...] = field(default=())


def read_records(path: Path) -> List[Record]:
    """Read annotated texts.

    path (Path): A `.jsonl` file of `{"text", "entities": [[start, end, label], ...]}`, with "labels" where each text was
        annotated for types of its own, a DocBin (`.spacy`) or a CoNLL file
        (token first, IOB tag last, blank line between sentences).
    RETURNS (List[Record]): The records in file order.
    RAISES: SamError S602 if there is no such file or kind of file, S603 (with the line) if it is malformed.
    """
    if not path.is_file():
        raise SamError("S602", path=path)
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path))
    if path.suffix == ".spacy":
        return list(_read_docbin(path))
    if path.suffix in CONLL_SUFFIXES:
        return list(_read_conll(path))
    raise SamError("S602", path=path)


def read_texts(path: Path) -> List[str]:
    """Read texts that need no annotation: `.jsonl` with "text", `.txt` (a text a line), or what `read_records` reads.

    RAISES: SamError S602 if there is no such file or kind of file, S603 (with the line) if it is malformed.
    """
    if path.suffix == ".txt" and path.is_file():
        return [line for _, line in read_lines(path)]
    if path.suffix == ".jsonl" and path.is_file():
        return [_text_of(path, number, line) for number, line in read_lines(path)]
    return [record.text for record in read_records(path)]


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise SamError("S603", path=path, line=number, problem=f"not a JSON object with 'text' ({error!r})") from error
    if not isinstance(text, str):
        raise SamError("S603", path=path, line=number, problem="'text' is not a string")
    return text


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            yield _to_record(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            problem = f"not a JSON object with 'text' and 'entities' ({error!r})"
            raise SamError("S603", path=path, line=number, problem=problem) from error


def read_lines(path: Path) -> Iterator[Tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without a byte order mark."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise SamError("S603", path=path, line=number + 1, problem=f"not UTF-8 from here on ({error})") from error


def _to_record(row: Dict[str, Any]) -> Record:
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError(f"text {text!r} is not a string")
    text.encode("utf8")  # half a surrogate pair is valid JSON and cannot be tokenised
    for start, end, label in row["entities"]:
        if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label:
            raise TypeError(f"entity {[start, end, label]} is not [start, end, label]")
        if not 0 <= start < end <= len(text):
            raise ValueError(f"entity {[start, end, label]} outside the text")
    entities = tuple(sorted((start, end, label) for start, end, label in row["entities"]))
    return Record(text, entities, _own_labels(row, entities))


def _own_labels(row: Dict[str, Any], entities: Sequence[Entity]) -> Optional[Tuple[str, ...]]:
    labels = row.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        raise TypeError(f"labels {labels!r} is not a list of names")
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels {labels} name a type twice")
    if not {label for _, _, label in entities} <= set(labels):
        raise ValueError(f"labels {labels} lack the type of an entity")
    return tuple(labels)


def _read_docbin(path: Path) -> Iterator[Record]:
    import spacy
    from spacy.tokens import DocBin

    try:
        docs = DocBin().from_disk(path).get_docs(spacy.blank("xx").vocab)
        for doc in docs:
            yield Record(doc.text, tuple((e.start_char, e.end_char, e.label_) for e in doc.ents))
    except (ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise SamError("S603", path=path, line=0, problem=f"not a DocBin ({error!r})") from error


def _read_conll(path: Path) -> Iterator[Record]:
    sentence: List[Tuple[str, str]] = []
    for number, line in read_lines(path):
        columns = line.strip(" \t\n").replace("\t", " ").split(" ")  # a token may hold other kinds of white space
        if columns[0] in ("", "-DOCSTART-"):
            yield from _close_sentence(sentence)
            sentence = []
        elif len(columns) < 2 or not IOB_TAG.fullmatch(columns[-1]):
            raise SamError("S603", path=path, line=number, problem="needs a token first and an IOB tag last")
        else:
            sentence.append((columns[0], columns[-1]))
    yield from _close_sentence(sentence)


def _close_sentence(sentence: Sequence[Tuple[str, str]]) -> Iterator[Record]:
    if not sentence:
        return
    text, previous = "", "O"
    entities: List[Entity] = []
    for token, tag in sentence:
        text += " " if text else ""
        start = len(text)
        text += token
        if tag.startswith("I-") and previous[2:] == tag[2:]:
            entities[-1] = (entities[-1][0], len(text), tag[2:])
        elif tag != "O":
            entities.append((start, len(text), tag[2:]))
        previous = tag
    yield Record(text, tuple(entities))


def load_dataset(path: Path, labels: Sequence[str] = ()) -> Dataset:
    """Read one corpus; its types are `labels`, or those that occur in it."""
    records = tuple(record for record in read_records(path) if record.text.strip())
    if not records:
        raise SamError("S604", path=path)
    found = {label for record in records for label in record.labels or (entity[2] for entity in record.entities)}
    seen = labels or sorted(found)
    return Dataset(path.name.split(".")[0], records, tuple(seen))
