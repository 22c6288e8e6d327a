"""Pipelines with a fake engine and a fake strategy, and what they should find: for tests of the component."""

from typing import Any, List, NamedTuple, Sequence, Tuple

import pytest
import spacy
from fakes import NAME, FakeEngine
from spacy.language import Language
from spacy.tokens import Doc

from spacy_sam.bank import ExpertBank
from spacy_sam.component import SamNer
from spacy_sam.errors import SamError

FAKES = {"engine": {"@misc": "sam_tests.FakeEngine.v1"}, "strategy": {"@misc": "sam_tests.FakeStrategy.v1"}}
LABELS = ["person", "place"]
TEXTS = [f"{name} and Anna met {name} in Quito , said Bo ." for name in ("Bella", "Cora", "Dan", "Emil", "Fay")]
Found = List[Tuple[int, int, str]]


def make_nlp(bank: Any, **config: Any) -> Tuple[Language, SamNer]:
    """A pipeline with a fake engine and a fake strategy, and its component."""
    nlp = spacy.blank("en")
    path = bank.path if isinstance(bank, ExpertBank) else bank
    return nlp, add_sam(nlp, **{"bank": str(path), "labels": LABELS, **FAKES, **config})


def add_sam(nlp: Language, name: str = "sam_ner", **config: Any) -> SamNer:
    """Add the component to a pipeline."""
    nlp.add_pipe("sam_ner", name=name, config=config)
    return sam_of(nlp, name)


def sam_of(nlp: Language, name: str = "sam_ner") -> SamNer:
    """The component of a pipeline."""
    sam = nlp.get_pipe(name)
    assert isinstance(sam, SamNer)
    return sam


class Case(NamedTuple):
    """A pipeline, its component and its bank."""

    nlp: Language
    sam: SamNer
    bank: ExpertBank

    @property
    def engines(self) -> List[FakeEngine]:
        return engines_of(self.sam)

    @property
    def samples(self) -> List[Tuple[str, ...]]:
        return self.sam.parts.strategy.samples  # type: ignore[attr-defined]


def names_in(text: str, number: int = 0, labels: Sequence[str] = LABELS) -> Found:
    """What the task model of the expert with this number finds, all of the text seen at once."""
    found = [(m.start(), m.end(), labels[len(m.group()) % len(labels)]) for m in NAME.finditer(text)]
    return [span for span in found if number == 0 or text[span[0]] != "ABC"[number]]


def ents(doc: Doc) -> Found:
    return [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]


def group(doc: Doc, key: str = "sc") -> Found:
    return [(span.start_char, span.end_char, span.label_) for span in doc.spans[key]]


def raises(code: str) -> Any:
    return pytest.raises(SamError, match=rf"^\[{code}\]")


def engines_of(sam: SamNer) -> List[FakeEngine]:
    """The engines that were made for it, none before the first use."""
    return sam.parts.make_engine.made  # type: ignore[attr-defined]
