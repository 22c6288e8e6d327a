"""The pipeline that annotates: makes it, and turns documents into what writers write."""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple

import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.util import import_file

from ..component import SamNer
from ..errors import SamError
from ..evaluate import make_pipeline
from ..plan import Plan
from .job import PipelineSpec
from .readers import Item
from .writers import DIGITS, Annotated, Entity

BATCHES = 4  # component batches that are in memory together


def load_pipeline(spec: PipelineSpec, device: Optional[str] = None) -> Tuple[Language, SamNer]:
    """Make the pipeline. No weights are loaded yet.

    RAISES: SamError S817 if a saved one cannot be loaded or has not one `sam_ner`.
    """
    if spec.code:
        import_file("spacy_sam_user_code", spec.code)
    if spec.pipeline is None:
        engine = {"engine": {"@misc": "spacy_sam.TorchEngine.v1", "device": device}} if device else {}
        nlp, sam = make_pipeline(Path(spec.bank) if spec.bank else None, spec.labels, **engine)
    else:
        nlp = _load(spec.pipeline)
        sam = _find(nlp, spec.pipeline)
        if device:
            nlp = _load(spec.pipeline, {f"components.{sam.name}.engine.device": device})
            sam = _find(nlp, spec.pipeline)
    if spec.max_length:
        nlp.max_length = spec.max_length
    sam.parts.open()
    return nlp, sam


def _load(name: str, overrides: Optional[Dict[str, Any]] = None) -> Language:
    try:
        return spacy.load(name, config=overrides or {})
    except SamError:
        raise
    except (OSError, ValueError) as error:
        raise SamError("S817", pipeline=name, problem=f"it cannot be loaded: {error}") from error


def _find(nlp: Language, name: str) -> SamNer:
    found = [pipe for _, pipe in nlp.pipeline if isinstance(pipe, SamNer)]
    if len(found) != 1:
        raise SamError("S817", pipeline=name, problem=f"it has {len(found)} of them: {', '.join(nlp.pipe_names)}")
    return found[0]


def pipeline_hash(nlp: Language) -> str:
    """Hash of the files that a saved pipeline was loaded from."""
    found = hashlib.sha256()
    root = nlp.path
    for path in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        found.update(path.relative_to(root).as_posix().encode("utf8", "surrogateescape") + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]


def own_plan(sam: SamNer) -> Optional[Plan]:
    """The plan that a saved pipeline brings for any corpus. RAISES: SamError S701 if it must have one and has none."""
    if sam.cfg["selection"] == "stream":
        return None
    if sam.plan is None and sam.cfg["selection"] == "manual":
        raise SamError("S701", name=sam.name)
    return sam.plan


class Annotator:
    """Annotates documents by one plan, always in the same batches. Those that fail come out with an error."""

    def __init__(self, nlp: Language, sam: SamNer) -> None:
        self.nlp = nlp
        self.sam = sam
        self.chunk_size = BATCHES * sam.cfg["batch_size"]
        self._errors: Dict[int, str] = {}
        nlp.set_error_handler(self._note)  # type: ignore[arg-type]  # spaCy's own handlers return, too

    def memory(self, items_are_docs: bool) -> ContextManager:
        """Frees the strings of documents when it ends. Docs from a DocBin share strings, and are left alone."""
        return nullcontext() if items_are_docs else self.nlp.memory_zone()

    def annotate(self, items: Sequence[Item], plan: Optional[Plan]) -> Iterator[Annotated]:
        """The documents of some items, in their order."""
        self._errors.clear()
        docs = [self._make_doc(number, item) for number, item in enumerate(items)]
        stream = ((doc, number) for number, doc in enumerate(docs) if doc is not None)
        settings = {self.sam.name: {"plan": plan}}
        done: Dict[int, Doc] = {}
        for doc, number in self.nlp.pipe(stream, as_tuples=True, component_cfg=settings):
            done[number] = doc
        for number, item in enumerate(items):
            error = self._errors.get(number)
            if number not in done:
                error = error or "a component of the pipeline left it out"
            yield self._failed(item, error) if error else self._annotated(item, done[number])

    def _make_doc(self, number: int, item: Item) -> Optional[Doc]:
        if item.doc is not None:
            return item.doc
        try:
            return self.nlp.make_doc(item.text)
        except ValueError as error:  # longer than nlp.max_length, for one
            self._errors[number] = " ".join(str(error).split())
            return None

    def _note(self, name: str, component: Any, docs: List[Doc], error: Exception) -> None:
        for doc in docs:
            number: Any = doc._context
            self._errors[number] = f"{name}: {type(error).__name__}: {error}"

    def _annotated(self, item: Item, doc: Doc) -> Annotated:
        entities = self._entities(doc)
        tokens = [(token.idx, token.idx + len(token), bool(token.whitespace_)) for token in doc]
        return Annotated(item.place, item.text, item.fields, entities, tokens, None, lambda: self._rounded(doc))

    def _failed(self, item: Item, error: str) -> Annotated:
        return Annotated(item.place, item.text, item.fields, error=error, make_doc=lambda: self._bare(item))

    def _entities(self, doc: Doc) -> List[Entity]:
        """Entities with their scores; all candidates where the pipeline writes no entities."""
        key = self.sam.cfg["spans_key"]
        group = doc.spans[key] if key is not None and key in doc.spans else ()
        scores = group.attrs.get("scores", []) if group else []
        known = {(s.start, s.end, s.label): round(score, DIGITS) for s, score in zip(group, scores)}
        spans = doc.ents if self.sam.cfg["annotate_ents"] else group
        return [(s.start_char, s.end_char, s.label_, known.get((s.start, s.end, s.label))) for s in spans]

    def _rounded(self, doc: Doc) -> Doc:
        key = self.sam.cfg["spans_key"]
        if key is not None and key in doc.spans:
            attrs = doc.spans[key].attrs
            attrs["scores"] = [round(score, DIGITS) for score in attrs.get("scores", [])]
        return doc

    def _bare(self, item: Item) -> Doc:
        if item.doc is not None:
            return item.doc
        try:
            return self.nlp.make_doc(item.text)
        except ValueError:
            return Doc(self.nlp.vocab, words=[item.text] if item.text else [], spaces=[False] if item.text else [])
