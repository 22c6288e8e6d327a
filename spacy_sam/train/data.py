"""Annotated corpora in: JSONL, DocBin and CoNLL files to records, records to tokenised training examples."""

import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

from ..errors import SamError
from ..prompts import PromptEncoder

Entity = Tuple[int, int, str]
CONLL_SUFFIXES = (".conll", ".bio", ".iob")
IOB_TAG = re.compile(r"O|[BI]-.+")
MAX_TRIED = 5000  # examples drawn in a row of which none fits, before the settings are found impossible
IGNORED = -100  # the label id that torch's cross entropy leaves out


@dataclass(frozen=True)
class Record:
    """One annotated text: `entities` are (start, end, label) in characters, sorted."""

    text: str
    entities: Tuple[Entity, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """The records of one corpus and the types that its annotators looked for (present in a record or not)."""

    name: str
    records: Tuple[Record, ...]
    labels: Tuple[str, ...] = field(default=())


def read_records(path: Path) -> List[Record]:
    """Read annotated texts.

    path (Path): A `.jsonl` file of `{"text", "entities": [[start, end, label], ...]}`, a DocBin (`.spacy`) or a CoNLL file
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


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            yield _to_record(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            problem = f"not a JSON object with 'text' and 'entities' ({error!r})"
            raise SamError("S603", path=path, line=number, problem=problem) from error


def _read_lines(path: Path) -> Iterator[Tuple[int, str]]:
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
    return Record(text, tuple(sorted((start, end, label) for start, end, label in row["entities"])))


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
    for number, line in _read_lines(path):
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
        if tag == "O":
            pass
        elif tag.startswith("I-") and previous[2:] == tag[2:]:
            entities[-1] = (entities[-1][0], len(text), tag[2:])
        else:
            entities.append((start, len(text), tag[2:]))
        previous = tag
    yield Record(text, tuple(entities))


def load_dataset(path: Path, labels: Sequence[str] = ()) -> Dataset:
    """Read one corpus; its types are `labels`, or those that occur in it."""
    records = tuple(record for record in read_records(path) if record.text.strip())
    if not records:
        raise SamError("S604", path=path)
    seen = labels or sorted({label for record in records for _, _, label in record.entities})
    return Dataset(path.name.split(".")[0], records, tuple(seen))


def ask(dataset: Dataset, record: Record, rng: random.Random, max_labels: int) -> Tuple[List[str], List[Entity]]:
    """Choose what one training prompt asks, so that the list is read and not memorised.

    Half the time all types of the corpus (up to `max_labels`), else a few: present and absent ones, shuffled. Types that
    are not asked are left out of the answer, so "nothing of this type" is learned.
    """
    present = sorted({label for _, _, label in record.entities if label in dataset.labels})
    absent = [label for label in dataset.labels if label not in present]
    if rng.random() < 0.5:
        asked = present + absent
    else:
        n_absent = rng.randint(0 if present else 1, 3)
        asked = rng.sample(present, rng.randint(1, len(present))) if present else []
        asked += rng.sample(absent, min(n_absent, len(absent)))
    rng.shuffle(asked)
    asked = asked[:max_labels]
    return asked, [entity for entity in record.entities if entity[2] in asked]


@dataclass(frozen=True)
class Example:
    """A tokenised prompt with its answer: loss is taken on `input_ids[n_prompt:]`."""

    input_ids: List[int]
    n_prompt: int


def encode_example(encoder: PromptEncoder, labels: Sequence[str], text: str, entities: Iterable[Entity]) -> Example:
    """Tokenise one prompt and its answer, end token included."""
    prompt = encoder.prefix(labels) + encoder.body(text)
    return Example(prompt + encoder.answer(text, entities), len(prompt))


def draw_batches(
    datasets: Sequence[Dataset],
    encoder: PromptEncoder,
    *,
    n_batches: int,
    tokens_per_batch: int,
    max_length: int,
    max_labels: int,
    seed: int,
) -> List[List[Example]]:
    """Draw the whole schedule of a run: batches of examples of like length under a token budget (padding counted).

    Corpora are drawn by the square root of their size, so that small ones are seen; each corpus is shuffled, and again
    when used up. The schedule depends on the arguments alone, so a resumed run meets the same batches.

    RETURNS (List[List[Example]]): No example is longer than `max_length`; one that is over the budget by itself has a
        batch of its own.
    RAISES: SamError S606 if there is nothing to draw from, or nothing fits.
    """
    names = ", ".join(dataset.name for dataset in datasets) or "no corpora"
    datasets = [dataset for dataset in datasets if dataset.records and dataset.labels]
    if not datasets:
        raise SamError("S606", names=names, reason="no corpus has both texts and entity types")
    rng = random.Random(seed)
    streams = [_endless(dataset, rng) for dataset in datasets]
    weights = [math.sqrt(len(dataset.records)) for dataset in datasets]
    batches: List[List[Example]] = []
    pool_size = max(64, 16 * tokens_per_batch // 128)
    n_tried = 0
    while len(batches) < n_batches:
        pool: List[Example] = []
        while len(pool) < pool_size:
            index = rng.choices(range(len(datasets)), weights)[0]
            record = next(streams[index])
            labels, entities = ask(datasets[index], record, rng, max_labels)
            example = encode_example(encoder, labels, record.text, entities)
            n_tried += 1
            if labels and len(example.input_ids) <= max_length:
                pool.append(example)
                n_tried = 0
            elif n_tried == MAX_TRIED:
                reason = f"of {MAX_TRIED} drawn, none fits {max_length} tokens with up to {max_labels} types asked"
                raise SamError("S606", names=names, reason=reason)
        filled = list(_fill(sorted(pool, key=lambda e: len(e.input_ids)), tokens_per_batch))
        rng.shuffle(filled)
        batches.extend(filled)
    return batches[:n_batches]


def _endless(dataset: Dataset, rng: random.Random) -> Iterator[Record]:
    records = list(dataset.records)
    while True:
        rng.shuffle(records)
        yield from records


def _fill(examples: Sequence[Example], tokens_per_batch: int) -> Iterator[List[Example]]:
    batch: List[Example] = []
    for example in examples:
        if batch and (len(batch) + 1) * len(example.input_ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
