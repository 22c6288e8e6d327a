"""Greedy generation on a transformers model: batched by length, shared prefix encoded once, finished rows dropped."""

import logging
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..bank import ExpertBank
from ..errors import SamError
from ..locks import ProcessLock
from ..merge.cache import MergedCache
from ..merge.materialise import WeightSwitch
from ..merge.methods import MergeMethod
from ..models import auto_model, is_tagger
from ..plan import TaskModelSpec
from ..prompts import PromptEncoder, make_format
from ..quiet import quiet_loading
from . import parallel, steps
from .answers import answer_limit, read_completion
from .batches import Batch, CausalBatch, Seq2SeqBatch, causal_step
from .devices import end_ids, resolve_device, resolve_dtype
from .engine import Completion, Request, of_versions
from .grammars import make_grammar, make_guess
from .passes import CausalPasses, Passes, Seq2SeqPasses
from .tagging import TagEncoder, TagRow, find_tags, tag_batch, tag_logits, write_answer

logger = logging.getLogger("spacy_sam")
MAX_PREFIXES = 32  # kept at a time, for pipelines that change their labels often
MAX_ROWS = 1000  # tokenised prompts kept from call to call, for other task models
MAX_GUESSES = 10_000  # answers kept from call to call, as first guesses of other task models
GIB = 1 << 30


class _Row(NamedTuple):
    """One request on its way: where its answer goes, the tokens of its body, its text (none in a whole prompt), and the prompt
    of a tagger."""

    place: int
    body: List[int]
    text: str = ""
    tagged: Optional[TagRow] = None


class _Group(NamedTuple):
    """Requests that share a task model and a prompt prefix."""

    task_model: TaskModelSpec
    labels: Tuple[str, ...]
    prefix: List[int]

    @property
    def key(self) -> Tuple[str, Tuple[str, ...]]:
        return self.task_model.fingerprint, self.labels


class TorchEngine:
    """Runs the task models of one bank on one device. The base is loaded once; task models are switched in place.

    Threads may share an engine: one at a time switches and generates.
    """

    def __init__(
        self,
        bank: ExpertBank,
        resolve: Callable[[Dict[str, Any]], MergeMethod],
        *,
        device: Optional[str] = None,
        dtype: Optional[str] = None,
        max_new_tokens: int = 320,
        tokens_per_batch: int = 8192,
        local_files_only: bool = False,
        constrained: bool = True,
        entity_bias: Optional[float] = None,
        cache_bytes: int = GIB,
        cache_dir: Optional[str] = None,
        cache_dir_bytes: int = 64 * GIB,
    ) -> None:
        """Load the base of a bank.

        bank (ExpertBank): The bank.
        resolve (Callable): Makes the merge method of a task model's config block.
        device (Optional[str]): "cpu", "cuda", "cuda:1", "mps", "gpu"; None for thinc's device, else the best there is.
        dtype (Optional[str]): "float32", "bfloat16" or "float16"; None for float32 on the CPU, bfloat16 elsewhere.
        max_new_tokens (int): The longest answer, in tokens.
        tokens_per_batch (int): Rows times length of a batch, padding and answers included; halved when memory runs out.
        local_files_only (bool): Never ask a hub, even for a base that is named by a hub id.
        constrained (bool): Keep answers to the grammar of the bank's format, if it has one.
        entity_bias (Optional[float]): Added to the logit of beginning an entity, under a grammar, or to that of every word, in a
            tagger: more finds more entities and more wrong ones. None for the bank's own, which was chosen on its dev
            sets. Scores are without it.
        cache_bytes (int): Memory on the device for merged weights of the task models used last.
        cache_dir (Optional[str]): Folder for merged weights, which later runs and other processes then find; None for none.
        cache_dir_bytes (int): The most bytes in that folder; what was used longest ago goes first.
        RAISES: SamError S501 to S503 if device, dtype or base cannot be used; S110 if the base was changed; S414 for a cache_dir
            that cannot be used.
        """
        from transformers import AutoTokenizer

        self.bank = bank
        self.device = resolve_device(device)
        torch_dtype = resolve_dtype(dtype, self.device)
        stored = None if cache_dir is None else MergedCache(Path(cache_dir), cache_dir_bytes, bank.base_hash)
        source, revision = bank.base
        bank.check_base()
        kwargs: Dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        with quiet_loading():
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
                loader = auto_model(source, revision, local_files_only)
                model: Any = loader.from_pretrained(source, dtype=torch_dtype, **kwargs)
            except (OSError, ValueError) as error:
                raise SamError("S503", path=source, reason=error) from error
        self.model = model.to(self.device).eval()
        self.encoder = PromptEncoder(tokenizer, make_format(bank.prompt))
        self.tagger = TagEncoder(self.encoder) if is_tagger(self.model.config) else None
        self.grammar = make_grammar(self.encoder) if constrained and self.tagger is None else None
        self.parallel = self.grammar is not None and parallel.can_decode(self.model)
        self.entity_bias = bank.entity_bias if entity_bias is None else entity_bias
        if stored is not None:
            commit = getattr(self.model.config, "_commit_hash", None)  # of a base from a hub
            stored.base = f"{bank.base_hash} {commit}"
        self.switch = WeightSwitch(self.model, bank.load_adapter, resolve, cache_bytes, bank.adapter_hash, stored)
        self.context = int(self.model.config.max_position_embeddings)
        self.max_new_tokens = max_new_tokens
        self.tokens_per_batch = tokens_per_batch
        self.end_ids = end_ids(self.model, tokenizer)
        self._lock = ProcessLock(at_rest=True)
        self._prefixes: Dict[Tuple[str, Tuple[str, ...]], Any] = {}
        self._rows: Dict[Tuple[Tuple[str, ...], str], _Row] = {}
        self._guesses: Dict[Tuple[Tuple[str, ...], str], Any] = {}

    @property
    def has_entity_bias(self) -> bool:
        """Whether `entity_bias` decides anything: under a grammar, and with a tagger."""
        return self.grammar is not None or self.tagger is not None

    def token_starts(self, text: str) -> List[int]:
        return self.encoder.starts(text)

    def prompt_length(self, labels: Sequence[str]) -> int:
        if self.tagger is not None:
            return self.tagger.prompt_length(labels)
        return len(self.encoder.prefix(labels)) + len(self.encoder.body(""))

    def generate(self, requests: Sequence[Request]) -> List[Completion]:
        """Complete every request greedily.

        requests (Sequence[Request]): In any mixture; those of one task model and label set are run together.
        RETURNS (List[Completion]): In the order given.
        RAISES: SamError S413 if the version of an expert that is asked is not in the bank any more, and nobody holds it.
        """
        with self._lock.held():
            return self._generate(of_versions(requests, self.bank))

    def _generate(self, requests: Sequence[Request]) -> List[Completion]:
        # Between calls alone, so that all task models of a large call find what the first one made.
        if len(self._rows) > MAX_ROWS:
            self._rows.clear()
        if len(self._guesses) > MAX_GUESSES:
            self._guesses.clear()
        asked = {request.labels for request in requests}
        prefixes = {labels: [] if self.tagger else self.encoder.prefix(labels) for labels in asked}
        groups: Dict[Tuple[str, Tuple[str, ...]], Tuple[_Group, List[_Row]]] = {}
        for place, request in enumerate(requests):
            group = _Group(request.task_model, request.labels, prefixes[request.labels])
            _, rows = groups.setdefault(group.key, (group, []))
            rows.append(self._row(place, request))
        done: Dict[int, Completion] = {}
        for group, rows in groups.values():
            done.update(self._run_group(group, rows))
        return [done[place] for place in range(len(requests))]

    def _row(self, place: int, request: Request) -> _Row:
        """Several task models are mostly asked about the same texts: these are tokenised once."""
        key = (request.labels if self.tagger else (), request.text)
        if key not in self._rows:
            tagged = self.tagger.row(*request[1:]) if self.tagger else None
            body = self.encoder.body(request.text) if tagged is None else tagged.ids
            self._rows[key] = _Row(place, body, request.text, tagged)
        return self._rows[key]._replace(place=place)

    def complete(self, task_model: TaskModelSpec, prompts: Sequence[str]) -> List[Completion]:
        """Complete whole prompts, as spacy-llm's tasks write them, greedily; those in the bank's own format under its grammar.

        task_model (TaskModelSpec): The task model.
        prompts (Sequence[str]): Any prompts, each with at least one token.
        RETURNS (List[Completion]): In the order given.
        RAISES: SamError S505 if the context holds no prompt that long and an answer, S507 if the base is a tagger and a prompt is
            not in the bank's own format.
        """
        with self._lock.held():
            return self._complete(self.bank.of_versions(task_model), prompts)

    def _complete(self, task_model: TaskModelSpec, prompts: Sequence[str]) -> List[Completion]:
        asked = [self._read(task_model, prompt) for prompt in prompts]
        if self.tagger is not None and None in asked:
            raise SamError("S507")
        rows = [
            _Row(place, self.encoder.whole(prompt))
            for place, (prompt, request) in enumerate(zip(prompts, asked))
            if request is None
        ]
        longest = max((len(row.body) for row in rows), default=0)
        if longest >= self.context:
            raise SamError("S505", n_tokens=longest, context=self.context)
        done = dict(self._run_group(_Group(task_model, (), []), rows))
        own = iter(self.generate([request for request in asked if request is not None]))
        return [done[place] if request is None else next(own) for place, request in enumerate(asked)]

    def _read(self, task_model: TaskModelSpec, prompt: str) -> Optional[Request]:
        """The request that a prompt in the bank's own format makes, so that its answer has the grammar; None for others."""
        if self.tagger is None and self.grammar is None:
            return None
        question = self.encoder.format.read(prompt)
        fits = question is not None and (self.tagger is not None or len(self.encoder.whole(prompt)) < self.context)
        return Request(task_model, *question) if question is not None and fits else None

    def _run_group(self, group: _Group, rows: List[_Row]) -> Iterator[Tuple[int, Completion]]:
        self.switch.use(group.task_model)
        rows = sorted(rows, key=lambda row: len(row.body))
        start = 0
        while start < len(rows):
            stop = self._batch_end(rows, start, len(group.prefix))
            batch = rows[start:stop]
            try:
                completions = self._decode(group, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens_per_batch = max(1, len(batch) * self._length(batch[-1], len(group.prefix)) // 2)
                logger.warning("Out of memory: going on with %d tokens per batch", self.tokens_per_batch)
                continue
            yield from ((row.place, completion) for row, completion in zip(batch, completions))
            start = stop

    def _batch_end(self, rows: List[_Row], start: int, n_prefix: int) -> int:
        stop = start + 1
        while stop < len(rows):
            if (stop + 1 - start) * self._length(rows[stop], n_prefix) > self.tokens_per_batch:
                break
            stop += 1
        return stop

    def _length(self, row: _Row, n_prefix: int) -> int:
        """Tokens of a prompt and its longest answer, of which a tagger has none."""
        return len(row.body) if self.tagger else n_prefix + len(row.body) + self._limit(len(row.body), n_prefix)

    def _limit(self, n_body: int, n_prefix: int) -> int:
        return answer_limit(n_body, self.context - n_prefix - n_body, self.max_new_tokens)

    @torch.inference_mode()
    def _decode(self, group: _Group, batch: List[_Row]) -> List[Completion]:
        if self.tagger is not None:
            return self._tag(group.labels, batch)
        # Whole prompts of other tasks have no labels, and no grammar.
        if self.parallel and group.labels:
            return self._decode_parallel(group, batch)
        walks = None
        if self.grammar is not None and group.labels:
            walks = [self.grammar.walk(group.labels, row.text) for row in batch]
        answers = steps.decode(
            self._open_batch(group, batch), self._limits(group, batch), self.end_ids, walks, self.entity_bias
        )
        return [self._completion(*answer) for answer in answers]

    def _limits(self, group: _Group, batch: List[_Row]) -> List[int]:
        return [self._limit(len(row.body), len(group.prefix)) for row in batch]

    def _tag(self, labels: Tuple[str, ...], batch: List[_Row]) -> List[Completion]:
        rows = [row.tagged for row in batch if row.tagged is not None]
        inputs = tag_batch(rows, self.encoder.tokenizer.pad_token_id)
        logits = tag_logits(self.model, {name: tensor.to(self.device) for name, tensor in inputs.items()})
        types, begins = (part.cpu() for part in logits)
        found = find_tags(types, begins, [len(row.words) for row in rows], self.entity_bias)
        shown = [self.encoder.format.shown(row.text) for row in batch]
        return [write_answer(*answer, labels) for answer in zip(shown, rows, found)]

    def _decode_parallel(self, group: _Group, batch: List[_Row]) -> List[Completion]:
        assert self.grammar is not None
        labels = self.grammar.trie(group.labels)
        # What another task model found in a text is mostly what this one finds: fewer passes, and the same answer.
        keys = [(group.labels, row.text) for row in batch]
        guesses = [
            make_guess(self.grammar, labels, row.text, limit, self._guesses.get(key))
            for row, limit, key in zip(batch, self._limits(group, batch), keys)
        ]
        parallel.decode(self.model, self._open_passes(group, batch), guesses, self.entity_bias)
        self._guesses.update(zip(keys, (guess.content for guess in guesses)))
        return [self._completion(guess.tokens, guess.logprobs) for guess in guesses]

    def _open_passes(self, group: _Group, batch: List[_Row]) -> Passes:
        if self.model.config.is_encoder_decoder:
            return Seq2SeqPasses(self.model, [[*group.prefix, *row.body] for row in batch])
        return CausalPasses(self.model, self._prefix_cache(group), len(group.prefix), [row.body for row in batch])

    def _open_batch(self, group: _Group, batch: List[_Row]) -> Batch:
        if self.model.config.is_encoder_decoder:
            return Seq2SeqBatch(self.model, [[*group.prefix, *row.body] for row in batch])
        return CausalBatch(self.model, self._prefix_cache(group), len(group.prefix), [row.body for row in batch])

    def _prefix_cache(self, group: _Group) -> Any:
        """The keys and values of the prompt's shared prefix, encoded once for each task model and labels."""
        from transformers import DynamicCache

        if not group.prefix:
            return DynamicCache(config=self.model.config)
        if group.key not in self._prefixes:
            if len(self._prefixes) >= MAX_PREFIXES:
                self._prefixes.clear()
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([group.prefix], device=self.device)
            positions = torch.arange(len(group.prefix), device=self.device)[None]
            causal_step(self.model, ids, torch.ones_like(ids), positions, cache)
            self._prefixes[group.key] = cache
        return self._prefixes[group.key]

    def _completion(self, tokens: List[int], logprobs: List[float]) -> Completion:
        return read_completion(self.encoder, tokens, logprobs, self.end_ids)
