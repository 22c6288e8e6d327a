"""What task models find in target corpora, kept on disk, and strict scores with bootstrap intervals."""

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
from spacy.language import Language
from spacy.tokens import Doc

from spacy_sam import evaluate as ev
from spacy_sam.align import Candidate, resolve_overlaps
from spacy_sam.annotate import Counts
from spacy_sam.component import SamNer
from spacy_sam.corpora import Record, read_records
from spacy_sam.plan import TaskModelSpec, fingerprint
from spacy_sam.select.base import Found, SelectionContext
from spacy_sam.windows import Window, doc_windows
from spacy_sam.write import merge_windows, to_spans

Entities = FrozenSet[Tuple[int, int, str]]
EXCLUDED = ("miscellaneous",)
VERSION = 3  # of what is kept on disk


@dataclass(frozen=True)
class Target:
    """An annotated corpus that is measured on: its records and the types that are asked."""

    name: str
    records: Tuple[Record, ...]
    labels: Tuple[str, ...]

    @cached_property
    def texts(self) -> List[str]:
        return [record.text for record in self.records]

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()[:16]


def read_target(path: Path, limit: Optional[int], seed: int = 0) -> Target:
    """A corpus without its "miscellaneous" type; of longer ones a random `limit` of sentences, in corpus order."""
    records = ev.exclude(read_records(path), EXCLUDED)
    labels = tuple(sorted({label for record in records for _, _, label in record.entities}))
    if limit is not None and limit < len(records):
        chosen = sorted(random.Random(seed).sample(range(len(records)), limit))
        records = [records[index] for index in chosen]
    return Target(path.name.split(".")[0], tuple(records), labels)


class Predictions:
    """Runs task models over targets once, and answers from memory or disk after that."""

    def __init__(self, nlp: Language, component: SamNer, cache: Path, say: Callable[[str], None] = print) -> None:
        """nlp: Tokenises. component: Holds bank and engine. cache: Folder, made if it is not there."""
        self.nlp = nlp
        self.component = component
        self.bank = component.parts.bank
        self.cache = cache
        self.say = say
        self._memory: Dict[str, List[List[Candidate]]] = {}
        self._counts: Dict[str, Dict[str, int]] = {}
        self._golds: Dict[str, List[Doc]] = {}
        cache.mkdir(parents=True, exist_ok=True)

    def candidates(self, spec: TaskModelSpec, target: Target) -> List[List[Candidate]]:
        """All candidates of one task model in each text; offsets in characters of the text."""
        key = self._key(spec, target)
        if key not in self._memory:
            path = self.cache / f"{key}.json"
            if not path.is_file():
                self._run(spec, target, path)
            data = json.loads(path.read_text(encoding="utf8"))
            self._counts[key] = data["counts"]
            self._memory[key] = [[Candidate(s, e, label, p, (0,)) for s, e, label, p in row] for row in data["found"]]
        return self._memory[key]

    def counts(self, spec: TaskModelSpec, target: Target) -> Dict[str, int]:
        """What became of its answers: see `annotate.Counts`."""
        self.candidates(spec, target)
        return self._counts[self._key(spec, target)]

    def entities(self, specs: Sequence[TaskModelSpec], target: Target, agree: int = 1) -> List[Entities]:
        """What a plan of these task models writes to `doc.ents`, in token offsets.

        agree (int): Task models that must find a span: 1 for the union, all of them for the intersection.
        """
        answers = [self.candidates(spec, target) for spec in specs]
        found = []
        for doc, *rows in zip(self.golds(target), *answers):
            joined = merge_windows([c._replace(sources=(n,)) for c in row] for n, row in enumerate(rows))
            pairs = to_spans(doc, [c for c in joined if len(c.sources) >= agree], 0.0)
            placed = {c._replace(start=span.start, end=span.end) for span, c in pairs}
            found.append(frozenset((c.start, c.end, c.label) for c in resolve_overlaps(placed)))
        return found

    def golds(self, target: Target) -> List[Doc]:
        if target.key not in self._golds:
            self._golds[target.key] = [ev.gold_doc(self.nlp, record) for record in target.records]
        return self._golds[target.key]

    def context(self, target: Target, texts: Sequence[str]) -> SelectionContext:
        """What selectors see of a target: some of its texts, no labels of theirs."""
        places = {text: place for place, text in enumerate(target.texts)}

        def annotate(spec: TaskModelSpec, asked: Sequence[str]) -> List[Found]:
            found = self.candidates(spec, target)
            return [frozenset((c.start, c.end, c.label) for c in found[places[text]]) for text in asked]

        parts = self.component.parts
        return SelectionContext(tuple(texts), target.labels, self.bank, parts.encoder, self.bank.encoder, annotate)

    def _key(self, spec: TaskModelSpec, target: Target) -> str:
        adapters = {name: self.bank.adapter_hash(name) for name in spec.experts}
        engine: Any = self.component.parts.annotator.engine
        decoding = [str(engine.model.dtype), engine.entity_bias]
        return fingerprint([VERSION, self.bank.base_hash, adapters, spec.fingerprint, target.key, decoding])

    def _run(self, spec: TaskModelSpec, target: Target, path: Path) -> None:
        annotator = self.component.parts.annotator
        annotator.counts = Counts()
        size = annotator.window_size(target.labels, 128)
        pieces: List[List[Window]] = [
            doc_windows(doc, token_starts=annotator.engine.token_starts, size=size, overlap=24)
            for doc in self.golds(target)
        ]
        answers = iter(annotator.annotate([spec], target.labels, [window for row in pieces for window in row]))
        found = [merge_windows([next(answers) for _ in row]) for row in pieces]
        rows = [[[c.start, c.end, c.label, round(c.score, 4)] for c in row] for row in found]
        path.write_text(json.dumps({"counts": vars(annotator.counts), "found": rows}), encoding="utf8")
        self.say(f"{target.name}: {spec.name} {spec.method}")


def tallies(found: Sequence[Entities], golds: Sequence[Doc]) -> np.ndarray:
    """Correct, found and gold entities of each text. RETURNS (ndarray): [n_texts, 3], int64."""
    gold = [frozenset((ent.start, ent.end, ent.label_) for ent in doc.ents) for doc in golds]
    return np.array([[len(f & g), len(f), len(g)] for f, g in zip(found, gold)], dtype=np.int64).reshape(-1, 3)


def f1(tally: np.ndarray) -> np.ndarray:
    """Micro F1 of summed tallies [..., 3]; 0 where nothing was found and nothing was there."""
    correct, total = tally[..., 0], tally[..., 1] + tally[..., 2]
    return np.divide(2 * correct, total, out=np.zeros(np.shape(correct)), where=total > 0)


def bootstrap(rows: Sequence[np.ndarray], n_draws: int, seed: int) -> np.ndarray:
    """F1 of resampled texts; the same seed draws the same texts, so that rows can be compared draw by draw.

    rows (Sequence[ndarray]): Tallies [n_texts, 3] of one row on one target for each seed of what is sampled.
    RETURNS (ndarray): [n_draws], the mean over `rows` of the F1 of each draw.
    """
    rng = np.random.default_rng(seed)
    n_texts = len(rows[0])
    draws = rng.multinomial(n_texts, np.full(n_texts, 1 / n_texts), size=n_draws)  # [n_draws, n_texts]
    return np.mean([f1(draws @ tally) for tally in rows], axis=0)
