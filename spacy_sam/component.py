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
from .bank import BANK_FILE, ExpertBank
from .errors import SamError
from .live import LiveBank
from .locks import ProcessLock
from .parts import HeldPlan, Parts, shared_types, some_types
from .plan import Plan
from .select.base import SelectionContext
from .settings import SPANS_KEY, Call, Labels, check_settings, read_call, read_labels, unlike
from .windows import Window, doc_windows
from .write import EntsFilter, merge_windows, to_spans, write_ents, write_spans


class SamNer(LiveBank, Pipe):
    """Named entity recognition without labels of the target: select experts, merge them, annotate with the union.

    The plan (which experts, merged how) is state of the component. `pipe` makes one from the first documents of a stream,
    `select` makes one from texts, and it is saved with the pipeline. Weights are loaded on first use. Threads may share a
    component; a call or a stream uses one plan from its beginning to its end, whatever is selected meanwhile.
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
        save_bank: bool = False,
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
            `spacy.prioritize_existing_ents_filter.v1`.
        overwrite (bool): Remove the entities and, under `spans_key`, the spans that are there, as in SpanRuler.
        save_bank (bool): Save a copy of the bank with the pipeline.
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
            "save_bank": save_bank,
        }
        check_settings(self.cfg)
        self.set_labels(labels)
        self._built_with = {**self.cfg, "bank": path}
        self._current: Optional[HeldPlan] = None
        self._selecting = ProcessLock()  # one selection at a time
        self._home_pid = self._guarded_pid = os.getpid()
        self._warned_single = False

    # Plan and parts

    @property
    def plan(self) -> Optional[Plan]:
        """What the next call will run; None before the first selection."""
        current = self._current
        return current.plan if current is not None else None

    @plan.setter
    def plan(self, plan: Optional[Plan]) -> None:
        self._current = self.parts.hold(plan) if plan is not None else None

    def reset(self) -> None:
        """Forget the plan: the next stream selects again."""
        self._current = None

    @property
    def labels(self) -> Tuple[str, ...]:
        """The labels entities get."""
        return tuple(self._asked(self._current))

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
        with self._selecting.held():
            return self._select(sample).plan

    def _select(self, sample: Sequence[str], labels: Optional[Dict[str, str]] = None) -> HeldPlan:
        """Select, and make it the plan at once: what runs keeps the one it has."""
        asked = labels or self.cfg["labels"]
        selected = self.parts.select(sample, tuple(asked.values()), self.cfg["window_size"])
        self._current = selected
        return selected

    # spaCy's calls

    def __call__(
        self,
        doc: Doc,
        *,
        batch_size: Optional[int] = None,
        plan: Optional[Plan] = None,
        labels: Optional[Labels] = None,
        threshold: Optional[float] = None,
    ) -> Doc:
        """Annotate one document, by the plan there is. Without one, select on this document alone, with a warning.

        doc (Doc): The document.
        batch_size (Optional[int]): Not used. `nlp.pipe` writes it into the `component_cfg` that it was given, which may be
            given to `nlp` next.
        plan (Optional[Plan]): Use this plan, for this call only.
        labels (Optional[Union[Sequence[str], Dict[str, str]]]): Ask these, for this call only.
        threshold (Optional[float]): Leave out what scores lower, for this call only.
        RETURNS (Doc): The same document.
        """
        error_handler = self.get_error_handler()
        call, held = self._prepare(plan, labels, threshold)
        held = held or self._current or self._plan_for_single(doc, call)
        try:
            self._annotate([doc], held, call)
        except SamError:
            raise
        except Exception as error:
            error_handler(self.name, self, [doc], error)
        return doc

    def pipe(
        self,
        stream: Iterable[Doc],
        *,
        batch_size: int = 128,
        plan: Optional[Plan] = None,
        labels: Optional[Labels] = None,
        threshold: Optional[float] = None,
    ) -> Iterator[Doc]:
        """Annotate a stream: look ahead, select if the stream needs a plan, then work through it in batches.

        stream (Iterable[Doc]): The documents.
        batch_size (int): spaCy's batch size; the component's own setting decides how many documents run together.
        plan (Optional[Plan]): Use this plan, for this stream only.
        labels (Optional[Union[Sequence[str], Dict[str, str]]]): Ask these, for this stream only.
        threshold (Optional[float]): Leave out what scores lower, for this stream only.
        YIELDS (Doc): The same documents in the same order, less those that an error handler took.
        """
        call, held = self._prepare(plan, labels, threshold)
        stream = iter(stream)
        head: List[Doc] = []
        if held is None:
            head = list(islice(stream, self._look_ahead()))
            held = self._plan_for_stream(head, call)
        for batch in util.minibatch(chain(head, stream), self.cfg["batch_size"]):
            if held is None:  # so far there was no text to select on
                held = self._plan_for_stream(batch, call)
            yield from self._annotate_safely(batch, held, call)

    def _look_ahead(self) -> int:
        """How many documents must be seen before the stream's plan is known."""
        if self._current is not None and self.cfg["selection"] != "stream":
            return 0
        return self.cfg["look_ahead"] if self.cfg["selection"] != "manual" else 0

    def _plan_for_stream(self, head: List[Doc], call: Call) -> Optional[HeldPlan]:
        kept = self._plan_to_keep(len(head))
        if kept is not None:
            return kept
        if self.cfg["selection"] == "manual":
            raise SamError("S701", name=self.name)
        texts = [doc.text for doc in head]
        if not any(text.strip() for text in texts):
            return None
        self._refuse_in_worker()
        with self._selecting.held():  # another stream may have selected meanwhile
            return self._plan_to_keep(len(head)) or self._select(texts, call.labels)

    def _plan_to_keep(self, n_docs: int) -> Optional[HeldPlan]:
        """The plan there is, if a stream of which so many documents were seen does not need one of its own."""
        needs_own = self.cfg["selection"] == "stream" and n_docs >= self.cfg["min_docs"] and not self._is_worker
        return None if needs_own else self._current

    def _plan_for_single(self, doc: Doc, call: Call) -> Optional[HeldPlan]:
        if self.cfg["selection"] == "manual":
            raise SamError("S701", name=self.name)
        if not doc.text.strip():
            return None
        self._refuse_in_worker()
        with self._selecting.held():
            if self._current is not None:  # another call has selected meanwhile
                return self._current
            self._warn_of_single()
            return self._select([doc.text], call.labels)

    def _warn_of_single(self) -> None:
        if not self._warned_single:
            self._warned_single = True
            warnings.warn(
                f"{self.name}: no plan yet, so experts are selected on one document alone. Give more: "
                f"nlp.get_pipe('{self.name}').select(texts), or nlp.pipe(texts).",
                stacklevel=4,
            )

    def _prepare(
        self, plan: Optional[Plan], labels: Optional[Labels], threshold: Optional[float]
    ) -> Tuple[Call, Optional[HeldPlan]]:
        """Before any work: the process is fit for it, settings and plan, given or loaded, are right, the bank is open.

        RETURNS (Tuple[Call, Optional[HeldPlan]]): What holds for this call, and the given plan.
        """
        self._guard_process()
        call = read_call(self.cfg, plan, labels, threshold)
        self._add_strings(call.labels or ())
        self.parts.open()
        current = self._current
        if plan is not None and (current is None or plan is not current.plan):
            return call, self.parts.hold_given(plan)
        if current is not None:
            self.parts.check(current)
        return call, current if plan is not None else None

    # Annotation

    def _annotate_safely(self, docs: List[Doc], held: Optional[HeldPlan], call: Call) -> Iterator[Doc]:
        """Annotate a batch; when it fails, halve it until the failing document stands alone."""
        try:
            self._annotate(docs, held, call)
        except SamError:
            raise
        except Exception as error:
            if len(docs) == 1:
                self.get_error_handler()(self.name, self, docs, error)
                return
            middle = len(docs) // 2
            yield from self._annotate_safely(docs[:middle], held, call)
            yield from self._annotate_safely(docs[middle:], held, call)
            return
        yield from docs

    def _annotate(self, docs: List[Doc], held: Optional[HeldPlan], call: Call) -> None:
        """Annotate documents together. Nothing is written before all answers are there."""
        found: List[List[Candidate]] = [[] for _ in docs]
        if held is not None and any(doc.text.strip() for doc in docs):
            found = self._find(docs, held, call.labels or self._asked(held))
        for doc, candidates in zip(docs, found):
            self._set_annotations(doc, candidates, held.plan if held is not None else None, call.threshold)

    def _find(self, docs: List[Doc], held: HeldPlan, asked: Dict[str, str]) -> List[List[Candidate]]:
        names = {phrase: name for name, phrase in asked.items()}
        calibration = self.parts.bank.calibration if self.cfg["calibrated"] else None
        size = self.parts.annotator.window_size(list(asked.values()), self.cfg["window_size"])
        windows = [self._windows(doc, size) for doc in docs]
        flat = [window for pieces in windows for window in pieces]
        answers = iter(self.parts.annotator.annotate(held.plan.versions, list(asked.values()), flat))
        named = []
        for pieces in windows:
            merged = merge_windows(list(islice(answers, len(pieces))))
            if calibration is not None:
                merged = calibration.apply(merged, held.plan.task_models)
            named.append([candidate._replace(label=names[candidate.label]) for candidate in merged])
        return named

    def _windows(self, doc: Doc, size: int) -> List[Window]:
        overlap = min(self.cfg["window_overlap"], size - 1)
        return doc_windows(doc, token_starts=self.parts.annotator.engine.token_starts, size=size, overlap=overlap)

    def _set_annotations(
        self, doc: Doc, candidates: Sequence[Candidate], plan: Optional[Plan], threshold: float
    ) -> None:
        pairs = to_spans(doc, candidates, threshold)
        if self.cfg["spans_key"] is not None:
            write_spans(doc, pairs, self.cfg["spans_key"], plan.fingerprint if plan else None, self.cfg["overwrite"])
        if self.cfg["annotate_ents"]:
            write_ents(doc, pairs, self.ents_filter, self.cfg["overwrite"])

    # Labels and processes

    def _asked(self, held: Optional[HeldPlan]) -> Dict[str, str]:
        """The words that are asked for each label. Without labels, these are the types of when the plan was made."""
        if self.cfg["labels"]:
            return self.cfg["labels"]
        is_ready = held is not None and held.adapters is not None
        shared = some_types(held.types if held is not None and is_ready else shared_types(self.bank))
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
        """Save labels, settings and plan, and with `save_bank` the bank; else it stays where it is, for pipelines to share.

        RAISES: SamError S707 if the bank's base is a folder outside of the bank.
        """
        cfg = {**self.cfg, "built_with": self._built_with}
        serialize = {
            "cfg": lambda p: srsly.write_json(p.with_suffix(".json"), cfg),
            "plan": lambda p: srsly.write_json(p.with_suffix(".json"), self._plan_data()),
        }
        if self.cfg["save_bank"]:
            serialize["bank"] = self.parts.save_bank
        util.to_disk(util.ensure_path(path), serialize, exclude)

    def from_disk(self, path: Union[str, Path], *, exclude: Iterable[str] = util.SimpleFrozenList()) -> "SamNer":
        """Load what `to_disk` saved. Weights are loaded on first use.

        A setting that this component was built with in another way than the saved one keeps its value: it is one that the
        `config` of `spacy.load` overrides.
        """
        deserialize = {
            "cfg": lambda p: self._load_cfg(self._less_overrides(srsly.read_json(p.with_suffix(".json")))),
            "plan": lambda p: self._load_plan(srsly.read_json(p.with_suffix(".json"))),
            "bank": self._load_bank,
        }
        util.from_disk(util.ensure_path(path), deserialize, exclude)
        return self

    def _less_overrides(self, saved: Dict[str, Any]) -> Dict[str, Any]:
        """Saved settings without those that were overridden when this component was built."""
        built_with = saved.pop("built_with", {})
        return {
            setting: value
            for setting, value in saved.items()
            if setting not in built_with or not unlike(self._built_with.get(setting), built_with[setting])
        }

    def _plan_data(self) -> Dict[str, Any]:
        return self.plan.to_dict() if self.plan else {}

    def _load_cfg(self, cfg: Dict[str, Any]) -> None:
        self.cfg.update(cfg)
        check_settings(self.cfg)
        self.set_labels(self.cfg["labels"])

    def _load_bank(self, folder: Path) -> None:
        """Use the bank that was saved with the pipeline, if one was, unless another was given in its place."""
        if not (folder / BANK_FILE).is_file():
            return
        saved = srsly.read_json(folder.with_name("cfg.json")).get("built_with", {})
        if self._built_with["bank"] == saved.get("bank"):
            self.parts.use_bank(folder)

    def _load_plan(self, data: Dict[str, Any]) -> None:
        self._current = HeldPlan(Plan.from_dict(data)) if data else None


def _rebuild(cls: Type[SamNer], vocab: Vocab, name: str, state: Dict[str, Any]) -> SamNer:
    component = cls.__new__(cls)
    component.vocab = vocab
    component.name = name
    component.__dict__.update(state)
    return component
