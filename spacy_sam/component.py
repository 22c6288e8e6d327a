"""The spaCy component: selects and merges experts for the stream at hand and annotates its documents."""

import os
import warnings
from itertools import chain, islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Type, Union

import srsly
from spacy import util
from spacy.pipeline import Pipe
from spacy.tokens import Doc
from spacy.vocab import Vocab

from .align import Candidate
from .annotate import check_labels
from .bank import ExpertBank
from .errors import SamError
from .parts import Parts
from .plan import Plan
from .select.base import SelectionContext
from .settings import SPANS_KEY, Labels, check_settings, read_labels
from .windows import Window, doc_windows
from .write import EntsFilter, merge_windows, to_spans, write_ents, write_spans


class SamNer(Pipe):
    """Named entity recognition without labels of the target: select experts, merge them, annotate with the union.

    The plan (which experts, merged how) is state of the component. `pipe` makes one from the first documents of a stream,
    `select` makes one from texts, and it is saved with the pipeline. Weights are loaded on first use.
    """

    def __init__(
        self,
        vocab: Vocab,
        name: str = "sam_ner",
        *,
        strategy: Callable[[SelectionContext], Plan],
        engine: Callable[[ExpertBank], Any],
        bank: Optional[Union[str, Path]] = None,
        labels: Labels = (),
        selection: str = "stream",
        look_ahead: int = 100,
        min_docs: int = 10,
        encoder: Optional[str] = None,
        window_size: int = 128,
        window_overlap: int = 24,
        batch_size: int = 64,
        threshold: float = 0.0,
        calibrated: bool = True,
        spans_key: Optional[str] = SPANS_KEY,
        annotate_ents: bool = True,
        ents_filter: Optional[EntsFilter] = None,
        overwrite: bool = False,
        scorer: Optional[Callable] = None,
    ) -> None:
        """Initialise the component.

        vocab (Vocab): The shared vocabulary.
        name (str): The component's name.
        strategy (Callable): From a sample to a plan; a registered `spacy_sam.SaM.v1` or `spacy_sam.SaMEco.v1`.
        engine (Callable): Loads the engine for a bank; a registered `spacy_sam.TorchEngine.v1`.
        bank (Optional[Union[str, Path]]): The bank's folder; None for the one that comes with the package.
        labels (Union[Sequence[str], Dict[str, str]]): What to look for. A dict gives the words that are asked for each
            label, as in {"ORG": "organization"}. Empty: the types that at least two experts of the bank know.
        selection (str): "stream": a plan for each stream of `min_docs` documents or more; "once": the first stream's plan
            is kept until `reset`; "manual": only `select` or a loaded plan.
        look_ahead (int): Documents at the head of a stream that selection looks at.
        min_docs (int): A stream shorter than this keeps the plan there is.
        encoder (Optional[str]): Path of the encoder for domain similarity, if not found under the bank's name for it.
        window_size (int): Longest window, in model tokens.
        window_overlap (int): Overlap of windows inside a sentence or an unsegmented document, in model tokens.
        batch_size (int): Documents annotated together.
        threshold (float): Entities with a lower score are left out; between 0 and 1.
        calibrated (bool): Scores are probabilities, by the bank's calibration. Raw ones if false, or if the bank has none.
        spans_key (Optional[str]): Where all candidates go in `doc.spans`; None for nowhere.
        annotate_ents (bool): Write non-overlapping candidates to `doc.ents`.
        ents_filter (Optional[Callable]): Merges existing entities and new ones, as in SpanRuler; None for
            `prioritize_existing_ents_filter`, or with `overwrite` for `prioritize_new_ents_filter`.
        overwrite (bool): New entities win over existing ones that they overlap.
        scorer (Optional[Callable]): The scoring method.
        RAISES: SamError S702 for settings out of range, S203 for labels that cannot be asked.
        """
        self.vocab = vocab
        self.name = name
        path = str(bank) if bank is not None else None
        self.parts = Parts(bank=path, strategy=strategy, engine=engine, encoder=encoder)
        self.ents_filter = ents_filter
        self.scorer = scorer
        self.cfg: Dict[str, Any] = {
            "labels": {},
            "selection": selection,
            "look_ahead": look_ahead,
            "min_docs": min_docs,
            "window_size": window_size,
            "window_overlap": window_overlap,
            "batch_size": batch_size,
            "threshold": threshold,
            "calibrated": calibrated,
            "spans_key": spans_key,
            "annotate_ents": annotate_ents,
            "overwrite": overwrite,
        }
        check_settings(self.cfg)
        self.set_labels(labels)
        self._plan: Optional[Plan] = None
        self._unchecked: Optional[Plan] = None  # a plan that was loaded, until it is held against the bank
        self._home_pid = self._guarded_pid = os.getpid()
        self._warned_single = False

    # Plan and parts

    @property
    def plan(self) -> Optional[Plan]:
        """What the next call will run; None before the first selection."""
        return self._plan

    @plan.setter
    def plan(self, plan: Optional[Plan]) -> None:
        if plan is not None:
            self.parts.bank.check_plan(plan)
        self._plan = plan

    def reset(self) -> None:
        """Forget the plan: the next stream selects again."""
        self._plan = None

    @property
    def labels(self) -> Tuple[str, ...]:
        """The labels entities get."""
        return tuple(self._asked())

    @property
    def label_data(self) -> List[str]:
        return list(self.labels)

    def add_label(self, label: str) -> int:
        """Add a label. RETURNS (int): 0 if it was there, else 1. RAISES: SamError S203 if it cannot be asked."""
        (checked,) = check_labels([label])
        if checked in self.cfg["labels"]:
            return 0
        self.set_labels({**self.cfg["labels"], checked: checked})
        return 1

    def select(self, texts: Iterable[Union[str, Doc]]) -> Plan:
        """Select experts for a corpus and keep the plan.

        texts (Iterable[Union[str, Doc]]): A sample of the corpus; the first `look_ahead` are looked at.
        RETURNS (Plan): The plan, also found in `plan`.
        RAISES: SamError S301 to S305 if nothing can be selected, S205 if `texts` is a single text.
        """
        if isinstance(texts, (str, Doc)):
            raise SamError("S205", setting="texts", expected="several texts or Docs", found="one")
        self._guard_process()
        head = islice(texts, self.cfg["look_ahead"])
        sample = [item.text if isinstance(item, Doc) else item for item in head]
        self._plan = self._select(sample)
        return self._plan

    def _select(self, sample: Sequence[str]) -> Plan:
        return self.parts.make_plan(sample, tuple(self._asked().values()), self.cfg["window_size"])

    # spaCy's calls

    def __call__(self, doc: Doc, *, plan: Optional[Plan] = None) -> Doc:
        """Annotate one document, by the plan there is. Without one, select on this document alone, with a warning.

        doc (Doc): The document.
        plan (Optional[Plan]): Use this plan, for this call only.
        RETURNS (Doc): The same document.
        """
        error_handler = self.get_error_handler()
        plan = self._prepare(plan) or self._plan or self._plan_for_single(doc)
        try:
            self._annotate([doc], plan)
        except SamError:
            raise
        except Exception as error:
            error_handler(self.name, self, [doc], error)
        return doc

    def pipe(self, stream: Iterable[Doc], *, batch_size: int = 128, plan: Optional[Plan] = None) -> Iterator[Doc]:
        """Annotate a stream: look ahead, select if the stream needs a plan, then work through it in batches.

        stream (Iterable[Doc]): The documents.
        batch_size (int): spaCy's batch size; the component's own setting decides how many documents run together.
        plan (Optional[Plan]): Use this plan, for this stream only.
        YIELDS (Doc): The same documents in the same order, less those that an error handler took.
        """
        plan = self._prepare(plan)
        stream = iter(stream)
        head: List[Doc] = []
        if plan is None:
            head = list(islice(stream, self._look_ahead()))
            plan = self._plan_for_stream(head)
        for batch in util.minibatch(chain(head, stream), self.cfg["batch_size"]):
            if plan is None:  # so far there was no text to select on
                plan = self._plan_for_stream(batch)
            yield from self._annotate_safely(batch, plan)

    def _look_ahead(self) -> int:
        """How many documents must be seen before the stream's plan is known."""
        if self._plan is not None and self.cfg["selection"] != "stream":
            return 0
        return self.cfg["look_ahead"] if self.cfg["selection"] != "manual" else 0

    def _plan_for_stream(self, head: List[Doc]) -> Optional[Plan]:
        mode = self.cfg["selection"]
        short = len(head) < self.cfg["min_docs"]
        if self._plan is not None and (mode != "stream" or short or self._is_worker):
            return self._plan
        if mode == "manual":
            raise SamError("S701", name=self.name)
        texts = [doc.text for doc in head]
        if not any(text.strip() for text in texts):
            return None
        self._refuse_in_worker()
        self._plan = self._select(texts)
        return self._plan

    def _plan_for_single(self, doc: Doc) -> Optional[Plan]:
        if self.cfg["selection"] == "manual":
            raise SamError("S701", name=self.name)
        if not doc.text.strip():
            return None
        self._refuse_in_worker()
        if not self._warned_single:
            self._warned_single = True
            warnings.warn(
                f"{self.name}: no plan yet, so experts are selected on one document alone. Give more: "
                f"nlp.get_pipe('{self.name}').select(texts), or nlp.pipe(texts).",
                stacklevel=3,
            )
        self._plan = self._select([doc.text])
        return self._plan

    def _prepare(self, plan: Optional[Plan]) -> Optional[Plan]:
        """Before any work: the process is fit for it, the bank can be opened, and the plan, given or loaded, is for it."""
        self._guard_process()
        self.parts.open()
        if plan is not None:
            self.parts.bank.check_plan(plan)
        elif self._plan is not None and self._plan is self._unchecked:
            self.parts.bank.check_plan(self._plan)
            self._unchecked = None
        return plan

    # Annotation

    def _annotate_safely(self, docs: List[Doc], plan: Optional[Plan]) -> Iterator[Doc]:
        """Annotate a batch; when it fails, halve it until the failing document stands alone."""
        try:
            self._annotate(docs, plan)
        except SamError:
            raise
        except Exception as error:
            if len(docs) == 1:
                self.get_error_handler()(self.name, self, docs, error)
                return
            middle = len(docs) // 2
            yield from self._annotate_safely(docs[:middle], plan)
            yield from self._annotate_safely(docs[middle:], plan)
            return
        yield from docs

    def _annotate(self, docs: List[Doc], plan: Optional[Plan]) -> None:
        """Annotate documents together. Nothing is written before all answers are there."""
        found: List[List[Candidate]] = [[] for _ in docs]
        if plan is not None and any(doc.text.strip() for doc in docs):
            found = self._find(docs, plan)
        for doc, candidates in zip(docs, found):
            self._set_annotations(doc, candidates, plan)

    def _find(self, docs: List[Doc], plan: Plan) -> List[List[Candidate]]:
        asked = self._asked()
        names = {phrase: name for name, phrase in asked.items()}
        calibration = self.parts.bank.calibration if self.cfg["calibrated"] else None
        size = self.parts.annotator.window_size(list(asked.values()), self.cfg["window_size"])
        windows = [self._windows(doc, size) for doc in docs]
        flat = [window for pieces in windows for window in pieces]
        answers = iter(self.parts.annotator.annotate(plan.task_models, list(asked.values()), flat))
        named = []
        for pieces in windows:
            merged = merge_windows(list(islice(answers, len(pieces))))
            if calibration is not None:
                merged = calibration.apply(merged, plan.task_models)
            named.append([candidate._replace(label=names[candidate.label]) for candidate in merged])
        return named

    def _windows(self, doc: Doc, size: int) -> List[Window]:
        overlap = min(self.cfg["window_overlap"], size - 1)
        return doc_windows(doc, token_starts=self.parts.annotator.engine.token_starts, size=size, overlap=overlap)

    def _set_annotations(self, doc: Doc, candidates: Sequence[Candidate], plan: Optional[Plan]) -> None:
        pairs = to_spans(doc, candidates, self.cfg["threshold"])
        if self.cfg["spans_key"] is not None:
            write_spans(doc, pairs, self.cfg["spans_key"], plan.fingerprint if plan else None, self.cfg["overwrite"])
        if self.cfg["annotate_ents"]:
            write_ents(doc, pairs, self.ents_filter, self.cfg["overwrite"])

    # Labels and processes

    def _asked(self) -> Dict[str, str]:
        """The words that are asked for each label."""
        if self.cfg["labels"]:
            return self.cfg["labels"]
        shared = self.parts.shared_types()
        self._add_strings(shared)
        return {label: label for label in shared}

    def set_labels(self, labels: Labels) -> None:
        self.cfg["labels"] = read_labels(labels)
        self._add_strings(self.cfg["labels"])

    def _add_strings(self, labels: Iterable[str]) -> None:
        for label in labels:
            self.vocab.strings.add(label, allow_transient=False)  # type: ignore[call-arg]  # newer than its stub

    def _guard_process(self) -> None:
        """In a new process: one torch thread (a forked thread pool hangs), and no CUDA model of the parent's."""
        if self._guarded_pid == os.getpid():
            return
        import torch

        torch.set_num_threads(1)
        self.parts.refuse_foreign_cuda()
        self._guarded_pid = os.getpid()

    def _refuse_in_worker(self) -> None:
        """A worker of n_process > 1 must not select: each would choose its own experts, from its own batch."""
        if self._is_worker:
            raise SamError("S703", name=self.name)

    @property
    def _is_worker(self) -> bool:
        return self._home_pid != os.getpid()

    # Serialisation

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.vocab, self.name, self.__dict__)

    def to_bytes(self, *, exclude: Iterable[str] = util.SimpleFrozenList()) -> bytes:
        """Serialise labels, settings and plan. exclude (Iterable[str]): Parts to leave out. RETURNS (bytes)."""
        serialize = {"cfg": lambda: srsly.json_dumps(self.cfg), "plan": lambda: srsly.json_dumps(self._plan_data())}
        return util.to_bytes(serialize, exclude)

    def from_bytes(self, data: bytes, *, exclude: Iterable[str] = util.SimpleFrozenList()) -> "SamNer":
        """Load what `to_bytes` gave."""
        deserialize = {
            "cfg": lambda b: self._load_cfg(srsly.json_loads(b)),
            "plan": lambda b: self._load_plan(srsly.json_loads(b)),
        }
        util.from_bytes(data, deserialize, exclude)
        return self

    def to_disk(self, path: Union[str, Path], *, exclude: Iterable[str] = util.SimpleFrozenList()) -> None:
        """Save labels, settings and plan. The bank stays where it is: it is shared by pipelines."""
        serialize = {
            "cfg": lambda p: srsly.write_json(p.with_suffix(".json"), self.cfg),
            "plan": lambda p: srsly.write_json(p.with_suffix(".json"), self._plan_data()),
        }
        util.to_disk(util.ensure_path(path), serialize, exclude)

    def from_disk(self, path: Union[str, Path], *, exclude: Iterable[str] = util.SimpleFrozenList()) -> "SamNer":
        """Load what `to_disk` saved. Weights are loaded on first use."""
        deserialize = {
            "cfg": lambda p: self._load_cfg(srsly.read_json(p.with_suffix(".json"))),
            "plan": lambda p: self._load_plan(srsly.read_json(p.with_suffix(".json"))),
        }
        util.from_disk(util.ensure_path(path), deserialize, exclude)
        return self

    def _plan_data(self) -> Dict[str, Any]:
        return self._plan.to_dict() if self._plan else {}

    def _load_cfg(self, cfg: Dict[str, Any]) -> None:
        self.cfg.update(cfg)
        check_settings(self.cfg)
        self.set_labels(self.cfg["labels"])

    def _load_plan(self, data: Dict[str, Any]) -> None:
        self._plan = self._unchecked = Plan.from_dict(data) if data else None


def _rebuild(cls: Type[SamNer], vocab: Vocab, name: str, state: Dict[str, Any]) -> SamNer:
    component = cls.__new__(cls)
    component.vocab = vocab
    component.name = name
    component.__dict__.update(state)
    return component
