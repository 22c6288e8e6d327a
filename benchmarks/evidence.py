"""What task models of a tagger say of the entities that they find, by every definition of a score."""

import json
import math
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Sequence, Tuple

import torch

from benchmarks.predictions import Predictions, Target
from spacy_sam.corpora import Entity
from spacy_sam.generate.tagging import Tag, TagRow, find_tags, tag_batch, tag_logits
from spacy_sam.plan import TaskModelSpec, fingerprint
from spacy_sam.windows import Window, doc_windows

CHOSEN = "typed mean, bounds"  # what `generate.tagging.find_tags` gives
FORMER = "mean"
LEAST = 1e-9  # probabilities are not below
N_ROWS = 16  # windows of a batch
Logs = Dict[str, float]  # natural logarithms of scores, by definition
Said = Dict[Entity, Logs]  # of the entities of one text


class Words(NamedTuple):
    """A tagger's probabilities for the words of one text.

    types: [words][types], that the word is of each type. inside: [words], of any. begins: [words], that the word begins an
    entity if it is in one. choice: [words][types], logits.
    """

    types: List[List[float]]
    inside: List[float]
    begins: List[float]
    choice: List[List[float]]


def definitions(words: Words, tag: Tag) -> Logs:
    """Every definition of an entity's score, a word at a time. "bounds": its neighbours are no part of it, and it is one."""
    run = range(tag.first, tag.last + 1)
    means = torch.tensor([words.choice[word] for word in run], dtype=torch.float64).mean(0)
    of_type = float(means.log_softmax(-1)[tag.label])
    inside = [_log(words.inside[word]) for word in run]
    typed = [_log(words.types[word][tag.label]) for word in run]
    uncut = [_log(1 - words.begins[word]) for word in run[1:]]
    start = end = 0.0
    if tag.first:
        start = _log(1 - words.inside[tag.first - 1] * (1 - words.begins[tag.first]))
    if tag.last + 1 < len(words.inside):
        end = _log(1 - words.inside[tag.last + 1] * (1 - words.begins[tag.last + 1]))
    bounds = start + end + sum(uncut)
    return {
        FORMER: of_type + _mean(inside),
        "product": of_type + sum(inside),
        "minimum": of_type + min(inside),
        "mean, bounds": of_type + _mean(inside) + bounds,
        "product, bounds": of_type + sum(inside) + bounds,
        "minimum, bounds": of_type + min(inside) + min([start, end, *uncut]),
        "typed mean": _mean(typed),
        "typed product": sum(typed),
        CHOSEN: _mean(typed) + bounds,
        "typed product, bounds": sum(typed) + bounds,
    }


def _log(probability: float) -> float:
    return math.log(max(probability, LEAST))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Evidence:
    """Runs task models over targets once, and answers from disk after that."""

    def __init__(self, predictions: Predictions) -> None:
        """predictions: Holds bank, engine (of a tagger), and the folder where answers are kept."""
        self.predictions = predictions
        self.annotator = predictions.component.parts.annotator
        self.engine: Any = self.annotator.engine
        if getattr(self.engine, "tagger", None) is None:
            raise SystemExit("The definitions are those of taggers, and the bank's base is none.")

    def __call__(self, spec: TaskModelSpec, target: Target) -> List[Said]:
        """Entities of each text, with every definition of their score."""
        path = self._path(spec, target)
        if not path.is_file():
            found = self._run(spec, target)
            path.write_text(json.dumps([[[*entity, logs] for entity, logs in said.items()] for said in found]))
        data = json.loads(path.read_text(encoding="utf8"))
        return [{(start, end, label): logs for start, end, label, logs in row} for row in data]

    def _path(self, spec: TaskModelSpec, target: Target) -> Path:
        bank = self.predictions.bank
        adapters = {name: bank.adapter_hash(name) for name in spec.experts}
        decoding = [str(self.engine.model.dtype), self.engine.entity_bias]
        key = fingerprint(["evidence", bank.base_hash, adapters, spec.fingerprint, target.key, decoding])
        return self.predictions.cache / f"{key}.json"

    def _run(self, spec: TaskModelSpec, target: Target) -> List[Said]:
        self.engine.switch.use(spec)
        size = self.annotator.window_size(target.labels, 128)
        found: List[Said] = [{} for _ in target.records]
        pieces = [
            (place, window)
            for place, doc in enumerate(self.predictions.golds(target))
            for window in doc_windows(doc, token_starts=self.engine.token_starts, size=size, overlap=24)
        ]
        pieces.sort(key=lambda piece: len(piece[1].text))
        for labels in self.annotator.format.groups(target.labels):
            for start in range(0, len(pieces), N_ROWS):
                batch = pieces[start : start + N_ROWS]
                for (place, _), said in zip(batch, self._read([window for _, window in batch], labels)):
                    for entity, logs in said.items():
                        known = found[place].get(entity, logs)
                        found[place][entity] = {name: max(log, known[name]) for name, log in logs.items()}
        return found

    @torch.inference_mode()
    def _read(self, windows: Sequence[Window], labels: Tuple[str, ...]) -> List[Said]:
        rows = [self.engine.tagger.row(labels, window.text) for window in windows]
        types, begins = tag_logits(self.engine.model, tag_batch(rows, self.engine.encoder.tokenizer.pad_token_id))
        found = find_tags(types, begins, [len(row.words) for row in rows], self.engine.entity_bias)
        shares, beginning = types.double().softmax(-1), begins.double().sigmoid()
        said: List[Said] = []
        for number, (row, window) in enumerate(zip(rows, windows)):
            n = len(row.words)
            words = Words(
                shares[number, :n, 1:].tolist(),
                (1 - shares[number, :n, 0]).tolist(),
                beginning[number, :n].tolist(),
                types[number, :n, 1:].tolist(),
            )
            said.append({_entity(row, window, tag, labels): definitions(words, tag) for tag in found[number]})
        return said


def _entity(row: TagRow, window: Window, tag: Tag, labels: Sequence[str]) -> Entity:
    start, end = row.characters[tag.first][0], row.characters[tag.last][1]
    return window.start + start, window.start + end, labels[tag.label]


def gold_of(target: Target) -> List[FrozenSet[Entity]]:
    """The entities of each text."""
    return [frozenset(record.entities) for record in target.records]
