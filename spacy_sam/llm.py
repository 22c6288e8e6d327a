"""The bridge to spacy-llm: one task model as a model for any task, and NER by windows as a task for any model.

spacy-llm decides what a task can do by its annotations: those of the protocol methods must be `typing.Iterable` and
`typing.Tuple`, and their names must be there at run time.
"""

import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import srsly
from spacy import util
from spacy.scorer import get_ner_prf
from spacy.tokens import Doc
from spacy.training import Example

from .align import Candidate, Scored, align, union
from .annotate import check_labels, fit_window
from .bank import ExpertBank, bundled_bank_path
from .errors import SamError
from .plan import Plan, TaskModelSpec
from .prompts import LinesFormat, PromptFormat, make_format
from .registered import TorchEngineMaker
from .settings import read_labels
from .windows import Window, doc_windows, estimate_starts
from .write import merge_windows, to_spans, write_ents


def make_merged(
    plan: Optional[Union[str, Path]] = None,
    experts: Optional[List[str]] = None,
    merge: Optional[Any] = None,
    bank: Optional[Union[str, Path]] = None,
    task_model: int = 1,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    max_new_tokens: int = 320,
    tokens_per_batch: int = 8192,
    local_files_only: bool = False,
) -> "MergedModel":
    """`spacy_sam.Merged.v1`: a task model as a spacy-llm model. It never sees the corpus, so it is told what to merge.
    Plan and cards are read here, weights with the first prompt.

    plan (Optional[Union[str, Path]]): A plan's file, as `spacy sam select` or `Plan.to_disk` wrote it.
    experts (Optional[List[str]]): Instead of a plan, the experts to merge; none of them is the untuned base.
    merge (Optional[MergeMethod]): With `experts`, a registered method; None for `spacy_sam.TIES.v1` with its defaults.
    bank (Optional[Union[str, Path]]): The bank's folder; None for the one that comes with the package.
    task_model (int): Which of the plan's task models, from 1.
    device, dtype, max_new_tokens, tokens_per_batch, local_files_only: As of `spacy_sam.TorchEngine.v1`.
    RAISES: SamError S101 to S106 or S115 for the bank, S111, S112 or S116 for the plan, S108 for an expert that is not
        in the bank, S113 for one that is named twice, S205 for other settings.
    """
    make_engine = TorchEngineMaker(device, dtype, max_new_tokens, tokens_per_batch, local_files_only)
    opened = ExpertBank(bank if bank is not None else bundled_bank_path())
    if (plan is None) == (experts is None):
        raise SamError("S205", setting="plan", expected="given, or 'experts', and not both", found=repr(plan))
    if plan is None:
        spec = TaskModelSpec(tuple(experts or ()), (), dict(merge.config) if merge is not None else {})
        return MergedModel(opened, spec, make_engine)
    if merge is not None:
        raise SamError("S205", setting="merge", expected="left out with a plan, which has its own", found=repr(merge))
    read = Plan.from_disk(plan)
    opened.check_plan(read)
    if task_model not in range(1, len(read.task_models) + 1):
        raise SamError("S205", setting="task_model", expected=f"1 to {len(read.task_models)}", found=repr(task_model))
    return MergedModel(opened, read.task_models[int(task_model) - 1], make_engine)


def make_ner(
    labels: Union[List[str], Dict[str, str]],
    bank: Optional[Union[str, Path]] = None,
    instruction: Optional[str] = None,
    window_size: int = 128,
    window_overlap: int = 24,
) -> "NerTask":
    """`spacy_sam.NER.v1`: the question that experts are trained on, as a spacy-llm task.

    labels (Union[List[str], Dict[str, str]]): What to look for; a dict gives the words that are asked for each label.
    bank (Optional[Union[str, Path]]): The bank whose prompt format is used; None for the one in the package.
    instruction (Optional[str]): For other models: use the default format behind these words, and read no bank.
    window_size (int): Longest window, in model tokens as `estimate_starts` guesses them. It is made smaller where
        prompt and answer would not fit the model's context length.
    window_overlap (int): Overlap of windows inside a sentence or an unsegmented document, in the same unit.
    RAISES: SamError S202 or S203 for the labels, S101 to S106 or S115 for the bank, S205 for the window.
    """
    for setting, value, least in (("window_size", window_size, 8), ("window_overlap", window_overlap, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SamError("S205", setting=setting, expected=f"a whole number of at least {least}", found=repr(value))
    if window_overlap >= window_size:
        raise SamError("S205", setting="window_overlap", expected="less than window_size", found=window_overlap)
    if instruction is not None:
        return NerTask(read_labels(labels), LinesFormat(instruction), window_size, window_overlap)
    opened = ExpertBank(bank if bank is not None else bundled_bank_path())
    return NerTask(read_labels(labels), make_format(opened.prompt), window_size, window_overlap)


class MergedModel:
    """One task model of a bank, for spacy-llm. All prompts of a batch of documents are completed in one call."""

    def __init__(self, bank: ExpertBank, task_model: TaskModelSpec, make_engine: Callable[[ExpertBank], Any]) -> None:
        """Nothing is loaded yet. RAISES: SamError S108 for an expert that is not in the bank."""
        for name in task_model.experts:
            bank[name]
        self.bank = bank
        self.task_model = task_model
        self.make_engine = make_engine
        self._engine: Any = None
        self._guarded_pid = os.getpid()

    @property
    def engine(self) -> Any:
        """The engine with its model, loaded on first use."""
        self._guard_process()
        if self._engine is None:
            self._engine = self.make_engine(self.bank)
        return self._engine

    @property
    def context_length(self) -> Optional[int]:
        """Tokens of prompt and answer together, known without loading; None for a base on a hub that is not here yet."""
        if self._engine is not None:
            return self._engine.context
        from transformers import AutoConfig

        source, revision = self.bank.base
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=True)
        except (OSError, ValueError):
            return None
        return int(config.max_position_embeddings)

    def __call__(self, prompts: Iterable[Iterable[str]]) -> Iterable[Iterable[str]]:
        """Complete prompts, nested by document; an empty one with nothing. RAISES: SamError S505 for one that is too long."""
        nested = [list(of_doc) for of_doc in prompts]
        flat = [prompt for of_doc in nested for prompt in of_doc if prompt]
        completions = iter(self.engine.complete(self.task_model, flat))
        return [[next(completions).text if prompt else "" for prompt in of_doc] for of_doc in nested]

    def _guard_process(self) -> None:
        """In a new process: one torch thread (a forked thread pool hangs), and no CUDA model of the parent's."""
        if self._guarded_pid == os.getpid():
            return
        import torch

        torch.set_num_threads(1)
        if self._engine is not None and self._engine.device.type == "cuda":
            raise SamError("S504", device=self._engine.device)
        self._guarded_pid = os.getpid()

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_engine": None}


class NerTask:
    """Asks windows of a document for entities and puts them into `doc.ents`, beside those that are there.

    spacy-llm's shards are whole documents that are joined afterwards, which moves offsets. Here each shard is the document
    itself, once for each prompt. More labels than one prompt asks are asked in groups: a window then has several prompts.
    A completion has no score, so of two new entities that overlap the longer one stays, then the earlier one.
    """

    def __init__(self, labels: Dict[str, str], prompt_format: PromptFormat, window_size: int, overlap: int) -> None:
        self.format = prompt_format
        self.window_size = window_size
        self.window_overlap = overlap
        self._labels = labels
        self._context: Optional[int] = None

    def generate_prompts(
        self, docs: Iterable[Doc], context_length: Optional[int] = None
    ) -> Iterable[Tuple[Iterable[str], Iterable[Doc]]]:
        """YIELDS: The prompts of a document, and the document as often. RAISES: SamError S202 without labels, S204."""
        self._context = context_length
        for doc in docs:
            questions = self._questions(doc)
            prompts = [self.format.prefix(labels) + self.format.body(window.text) for labels, window in questions]
            yield prompts, [doc] * len(questions)

    def parse_responses(self, shards: Iterable[Iterable[Doc]], responses: Iterable[Iterable[str]]) -> Iterable[Doc]:
        """Set entities. The same windows are cut again: nothing is kept from `generate_prompts` but the context length."""
        for of_doc, answers in zip(shards, responses):
            doc = next(iter(of_doc))
            pairs = zip(self._questions(doc), answers, strict=True)
            found = [self._candidates(*question, answer) for question, answer in pairs]
            names = {phrase: name for name, phrase in self._labels.items()}
            named = [candidate._replace(label=names[candidate.label]) for candidate in merge_windows(found)]
            write_ents(doc, to_spans(doc, named, 0.0), None, False)
            yield doc

    def _questions(self, doc: Doc) -> List[Tuple[Tuple[str, ...], Window]]:
        """Labels and window of each prompt, at least one, as spacy-llm needs a shard of every document."""
        groups = self.format.groups(list(self._labels.values()))
        if not groups:
            raise SamError("S202", expected="at least one name", found="none")
        size = self.window_size
        if self._context is not None:
            n_prefix = max(len(estimate_starts(self.format.prefix(g) + self.format.body(""))) for g in groups)
            size = fit_window(n_prefix, self._context, size)
        overlap = min(self.window_overlap, size - 1)
        windows = doc_windows(doc, token_starts=estimate_starts, size=size, overlap=overlap)
        return [(group, window) for group in groups for window in windows] or [(groups[0], Window("", 0))]

    def _candidates(self, labels: Sequence[str], window: Window, answer: str) -> List[Candidate]:
        scored = [Scored(m.label, m.surface, 1.0) for m in self.format.parse(answer, labels).mentions]
        return union(align(scored, window.text, window.start)[0])

    @property
    def prompt_template(self) -> str:
        """What spacy-llm's cache compares, so that answers to other labels are not taken for answers to these."""
        return self.format.prefix(list(self._labels.values())) + self.format.body("{text}")

    def scorer(self, examples: Iterable[Example]) -> Dict[str, Any]:
        """Strict scores of `doc.ents`, as of spaCy's own NER."""
        return get_ner_prf(examples)

    @property
    def labels(self) -> Tuple[str, ...]:
        """The labels entities get."""
        return tuple(self._labels)

    def add_label(self, label: str, label_definition: Optional[str] = None) -> int:
        """Add a label; `label_definition` is what is asked for it. RETURNS (int): 0 if it was there, else 1."""
        (checked,) = check_labels([label])
        if checked in self._labels:
            return 0
        self._labels = read_labels({**self._labels, checked: label_definition or checked})
        return 1

    def clear(self) -> None:
        """Forget all labels."""
        self._labels = {}

    def to_bytes(self, *, exclude: Iterable[str] = util.SimpleFrozenList()) -> bytes:
        """Serialise the labels; the other settings are in the pipeline's config."""
        return util.to_bytes({"labels": lambda: srsly.json_dumps(self._labels)}, exclude)

    def from_bytes(self, data: bytes, *, exclude: Iterable[str] = util.SimpleFrozenList()) -> "NerTask":
        util.from_bytes(data, {"labels": lambda b: self._load(srsly.json_loads(b))}, exclude)
        return self

    def to_disk(self, path: Union[str, Path], *, exclude: Iterable[str] = util.SimpleFrozenList()) -> None:
        util.to_disk(util.ensure_path(path), {"labels.json": lambda p: srsly.write_json(p, self._labels)}, exclude)

    def from_disk(self, path: Union[str, Path], *, exclude: Iterable[str] = util.SimpleFrozenList()) -> "NerTask":
        util.from_disk(util.ensure_path(path), {"labels.json": lambda p: self._load(srsly.read_json(p))}, exclude)
        return self

    def _load(self, labels: Dict[str, str]) -> None:
        self._labels = read_labels(labels)
