"""Records to tokenised training examples, and the schedule of batches."""

import math
import random
from dataclasses import dataclass
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ..corpora import Dataset, Entity, Record, load_dataset, read_records
from ..errors import SamError
from ..generate.constrain import Grammar
from ..generate.tagging import TagEncoder, TagRow
from ..prompts import PromptEncoder

__all__ = ["Dataset", "Example", "Record", "ask", "draw_batches", "encode_example", "load_dataset", "read_records"]
MAX_TRIED = 5000  # examples drawn in a row of which none fits, before the settings are found impossible
ALIAS_SHARE = 0.4
IGNORED = -100  # the label id that torch's cross entropy leaves out


def ask(dataset: Dataset, record: Record, rng: random.Random, max_labels: int) -> Tuple[List[str], List[Entity]]:
    """Choose what one training prompt asks, so that the list is read and not memorised.

    Half the time all types of the corpus (up to `max_labels`), else a few: present and absent ones, shuffled. Types that
    are not asked are left out of the answer, so "nothing of this type" is learned. A record with its own types is asked
    for these.
    """
    if record.labels is not None:
        own = rng.sample(record.labels, min(len(record.labels), max_labels))
        return own, [entity for entity in record.entities if entity[2] in own]
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


def rename(
    labels: Sequence[str], entities: Sequence[Entity], aliases: Mapping[str, Sequence[str]], rng: random.Random
) -> Tuple[List[str], List[Entity]]:
    """Ask some types by another name, so that a name is understood and not memorised as a code for a corpus's type.

    Each type that has aliases gets one with a chance of ALIAS_SHARE, unless the prompt has that name already.
    """
    names: Dict[str, str] = {}
    for label in labels:
        free = [alias for alias in aliases.get(label, ()) if alias not in labels and alias not in names.values()]
        names[label] = rng.choice(free) if free and rng.random() < ALIAS_SHARE else label
    return [names[label] for label in labels], [(start, end, names[label]) for start, end, label in entities]


class Tags(NamedTuple):
    """A tagger's answer: for each word of the prompt its type (0 for none, else the label's number from 1), and whether it begins
    an entity."""

    row: TagRow
    types: Tuple[int, ...]
    begins: Tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A tokenised prompt with its answer: loss is taken on `input_ids[n_prompt:]`, or on `tags`.

    labels, text: What was asked, for the grammar of the answer. tags: The answer of a tagger, whose `input_ids` are the prompt.
    """

    input_ids: List[int]
    n_prompt: int
    labels: Tuple[str, ...] = ()
    text: str = ""
    tags: Optional[Tags] = None


def encode_example(
    encoder: Union[PromptEncoder, TagEncoder],
    labels: Sequence[str],
    text: str,
    entities: Sequence[Entity],
    grammar: Optional[Grammar] = None,
) -> Optional[Example]:
    """Tokenise one prompt and its answer, end token included. RETURNS: None if the grammar or a tagger has no such answer."""
    if isinstance(encoder, TagEncoder):
        return _encode_tags(encoder, labels, text, entities)
    prompt = encoder.prefix(labels) + encoder.body(text)
    answer = encoder.answer(text, entities) if grammar is None else grammar.answer(labels, text, entities)
    return Example(prompt + answer, len(prompt), tuple(labels), text) if answer is not None else None


def _encode_tags(
    encoder: TagEncoder, labels: Sequence[str], text: str, entities: Sequence[Entity]
) -> Optional[Example]:
    """None if the text has no words, or an entity is not of whole words or overlaps another."""
    row = encoder.row(labels, text)
    firsts = {start: word for word, (start, _) in enumerate(row.characters)}
    lasts = {end: word for word, (_, end) in enumerate(row.characters)}
    types, begins = [0] * len(row.words), [0] * len(row.words)
    for start, end, label in entities:
        first, last = firsts.get(start), lasts.get(end)
        if first is None or last is None or any(types[first : last + 1]):
            return None
        types[first : last + 1] = [labels.index(label) + 1] * (last + 1 - first)
        begins[first] = 1
    tags = Tags(row, tuple(types), tuple(begins))
    return Example(row.ids, len(row.ids), tuple(labels), text, tags) if row.words else None


def draw_batches(
    datasets: Sequence[Dataset],
    encoder: Union[PromptEncoder, TagEncoder],
    *,
    n_batches: int,
    tokens_per_batch: int,
    max_length: int,
    max_labels: int,
    seed: int,
    aliases: Mapping[str, Sequence[str]] = {},
    grammar: Optional[Grammar] = None,
    general: Sequence[Dataset] = (),
    general_share: float = 0.0,
) -> List[List[Example]]:
    """Draw the whole schedule of a run: batches of examples of like length under a token budget (padding counted).

    Corpora are drawn by the square root of their size, so that small ones are seen; each corpus is shuffled, and again
    when used up. `aliases` are other names of types; see `rename`. Of `general` corpora comes a `general_share` of the
    examples. The schedule depends on the arguments alone, so a resumed run meets the same batches.

    RETURNS (List[List[Example]]): No example is longer than `max_length`; one that is over the budget by itself has a
        batch of its own.
    RAISES: SamError S606 if there is nothing to draw from, or nothing fits.
    """
    names = ", ".join(dataset.name for dataset in datasets) or "no corpora"
    datasets = _usable(datasets)
    if not datasets:
        raise SamError("S606", names=names, reason="no corpus has both texts and entity types")
    general = _usable(general) if general_share else []
    weights = _shares(datasets, 1 - general_share if general else 1) + _shares(general, general_share)
    datasets += general
    rng = random.Random(seed)
    streams = [_endless(dataset, rng) for dataset in datasets]
    batches: List[List[Example]] = []
    pool_size = max(64, 16 * tokens_per_batch // 128)
    n_tried = 0
    while len(batches) < n_batches:
        pool: List[Example] = []
        while len(pool) < pool_size:
            index = rng.choices(range(len(datasets)), weights)[0]
            record = next(streams[index])
            labels, entities = ask(datasets[index], record, rng, max_labels)
            labels, entities = rename(labels, entities, aliases, rng)
            example = encode_example(encoder, labels, record.text, entities, grammar)
            n_tried += 1
            if labels and example is not None and len(example.input_ids) <= max_length:
                pool.append(example)
                n_tried = 0
            elif n_tried == MAX_TRIED:
                reason = f"of {MAX_TRIED} drawn, none fits {max_length} tokens with up to {max_labels} types asked"
                raise SamError("S606", names=names, reason=reason)
        filled = list(_fill(sorted(pool, key=lambda e: len(e.input_ids)), tokens_per_batch))
        rng.shuffle(filled)
        batches.extend(filled)
    return batches[:n_batches]


def _usable(datasets: Sequence[Dataset]) -> List[Dataset]:
    return [dataset for dataset in datasets if dataset.records and (dataset.labels or dataset.records[0].labels)]


def _shares(datasets: Sequence[Dataset], total: float) -> List[float]:
    """What is drawn of each corpus, in proportion to the square root of its size; `total` together."""
    roots = [math.sqrt(len(dataset.records)) for dataset in datasets]
    return [total * root / sum(roots) for root in roots]


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
