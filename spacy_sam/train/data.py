"""Annotated corpora in: JSONL, DocBin and CoNLL files to records, records to tokenised training examples."""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

from ..errors import SamError
from ..prompts import PromptFormat

Entity = Tuple[int, int, str]
CONLL_SUFFIXES = (".conll", ".bio", ".iob")
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
    with path.open(encoding="utf8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _to_record(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                problem = f"not a JSON object with 'text' and 'entities' ({error!r})"
                raise SamError("S603", path=path, line=number, problem=problem) from error


def _to_record(row: Dict[str, Any]) -> Record:
    text = row["text"]
    entities = sorted((int(start), int(end), str(label)) for start, end, label in row["entities"])
    for start, end, label in entities:
        if not (0 <= start < end <= len(text)) or not label:
            raise ValueError(f"entity {(start, end, label)} outside the text")
    return Record(text, tuple(entities))


def _read_docbin(path: Path) -> Iterator[Record]:
    import spacy
    from spacy.tokens import DocBin

    try:
        docs = DocBin().from_disk(path).get_docs(spacy.blank("xx").vocab)
        for doc in docs:
            yield Record(doc.text, tuple((e.start_char, e.end_char, e.label_) for e in doc.ents))
    except (ValueError, KeyError, EOFError, OSError) as error:
        raise SamError("S603", path=path, line=0, problem=f"not a DocBin ({error!r})") from error


def _read_conll(path: Path) -> Iterator[Record]:
    sentence: List[Tuple[str, str]] = []
    with path.open(encoding="utf8") as file:
        for number, line in enumerate(file, 1):
            columns = line.split()
            if not columns or columns[0] == "-DOCSTART-":
                yield from _close_sentence(sentence)
                sentence = []
            elif len(columns) < 2:
                raise SamError("S603", path=path, line=number, problem="needs a token and an IOB tag")
            else:
                sentence.append((columns[0], columns[-1]))
    yield from _close_sentence(sentence)


def _close_sentence(sentence: Sequence[Tuple[str, str]]) -> Iterator[Record]:
    if not sentence:
        return
    text, entities, previous = "", [], "O"
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
    present = sorted({label for _, _, label in record.entities})
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


class PromptEncoder:
    """Tokenises the parts of a prompt for one tokenizer and format.

    Text is never read as special tokens, so a document that contains the end token's name is only text.
    """

    def __init__(self, tokenizer: Any, prompt_format: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format

    def plain(self, text: str) -> List[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prefix(self, labels: Sequence[str]) -> List[int]:
        start = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        return start + self.plain(self.format.prefix(labels))

    def body(self, text: str) -> List[int]:
        return self.plain(self.format.body(text))

    def example(self, labels: Sequence[str], text: str, entities: Iterable[Entity]) -> Example:
        prompt = self.prefix(labels) + self.body(text)
        answer = self.plain(self.format.answer(text, entities)) + [self.tokenizer.eos_token_id]
        return Example(prompt + answer, len(prompt))


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
    """
    rng = random.Random(seed)
    streams = [_endless(dataset, rng) for dataset in datasets]
    weights = [math.sqrt(len(dataset.records)) for dataset in datasets]
    batches: List[List[Example]] = []
    pool_size = max(64, 16 * tokens_per_batch // 128)
    while len(batches) < n_batches:
        pool: List[Example] = []
        while len(pool) < pool_size:
            index = rng.choices(range(len(datasets)), weights)[0]
            record = next(streams[index])
            labels, entities = ask(datasets[index], record, rng, max_labels)
            example = encoder.example(labels, record.text, entities)
            if labels and len(example.input_ids) <= max_length:
                pool.append(example)
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
