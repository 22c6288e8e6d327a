"""Greedy generation on vLLM, which runs in a process and an environment of its own: its pins clash with ours.

The other end is `vllm_worker`. Prompts, grammars and answers are made here, as for `TorchEngine`; only token ids go over.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..bank import ExpertBank
from ..errors import SamError
from ..locks import ProcessLock
from ..merge.folders import TaskModelFolders
from ..merge.methods import MergeMethod
from ..models import is_tagger
from ..plan import TaskModelSpec
from ..prompts import PromptEncoder, make_format
from .answers import answer_limit, read_completion
from .devices import DTYPES, end_ids
from .engine import Completion, Request, of_versions
from .grammars import make_grammar
from .lark import bias_logits, write_grammar

WORKER = Path(__file__).with_name("vllm_worker.py")
PATIENCE = 30  # seconds that a worker has to end by itself
MAX_MESSAGES = 16_384  # bytes at the end of the worker's messages that an error looks at
N_LINES = 20  # lines of them that it shows


class VLLMEngine:
    """Runs the task models of one bank on vLLM: one at a time, each from a folder of merged weights, switched in place.

    Threads may share an engine: one at a time switches and generates.
    """

    def __init__(
        self,
        bank: ExpertBank,
        resolve: Callable[[Dict[str, Any]], MergeMethod],
        *,
        python: Optional[str] = None,
        cache: Optional[str] = None,
        max_task_models: int = 4,
        dtype: Optional[str] = None,
        max_new_tokens: int = 320,
        constrained: bool = True,
        entity_bias: Optional[float] = None,
        options: Optional[Dict[str, Any]] = None,
    ) -> None:
        """Start the worker. Weights are merged and loaded with the first requests.

        bank (ExpertBank): The bank.
        resolve (Callable): Makes the merge method of a task model's config block.
        python (Optional[str]): The interpreter that has vLLM; None for the one that runs this.
        cache (Optional[str]): Folder for merged models, which later runs then find; None for a temporary one.
        max_task_models (int): Merged models kept in it, each as large as the base.
        dtype (Optional[str]): "float32", "bfloat16" or "float16"; None for float32 on the CPU, bfloat16 elsewhere.
        max_new_tokens (int): The longest answer, in tokens.
        constrained (bool): Keep answers to the grammar of the bank's format.
        entity_bias (Optional[float]): As of `TorchEngine`.
        options (Optional[Dict[str, Any]]): More arguments of `vllm.LLM`, such as tensor_parallel_size.
        RAISES: SamError S502, S503 or S508 if dtype or base cannot be used, S110 if the base was changed, S509 if the interpreter
            has no vLLM, S510 if it fails.
        """
        if dtype is not None and dtype not in DTYPES:
            raise SamError("S502", dtype=dtype, known=", ".join(DTYPES))
        bank.check_base()
        config, tokenizer, generation = _read_base(*bank.base)
        _refuse_others(config)
        self.bank = bank
        self.encoder = PromptEncoder(tokenizer, make_format(bank.prompt))
        self.grammar = make_grammar(self.encoder) if constrained else None
        self.entity_bias = bank.entity_bias if entity_bias is None else entity_bias
        self.max_new_tokens = max_new_tokens
        self.end_ids = end_ids(SimpleNamespace(generation_config=generation), tokenizer)
        self.context = int((options or {}).get("max_model_len") or config.max_position_embeddings)
        self._settings = {"dtype": dtype, **(options or {}), "max_model_len": self.context}
        self._python = python or sys.executable
        self._pid = os.getpid()
        self._folders = TaskModelFolders(bank, resolve, self._cache(cache), max_task_models)
        self._lock = ProcessLock()
        self._active: Optional[str] = None
        self._worker: Optional[Worker] = Worker(self._python)

    def _cache(self, folder: Optional[str]) -> Path:
        if folder is not None:
            return Path(folder)
        made = Path(tempfile.mkdtemp(prefix="spacy-sam-"))
        weakref.finalize(self, _in_process, os.getpid(), shutil.rmtree, made, ignore_errors=True)
        return made

    @property
    def has_entity_bias(self) -> bool:
        """Whether `entity_bias` decides anything: under a grammar."""
        return self.grammar is not None

    def token_starts(self, text: str) -> List[int]:
        return self.encoder.starts(text)

    def prompt_length(self, labels: Sequence[str]) -> int:
        return len(self.encoder.prefix(labels)) + len(self.encoder.body(""))

    def generate(self, requests: Sequence[Request]) -> List[Completion]:
        """Complete every request greedily.

        requests (Sequence[Request]): In any mixture; those of one task model are run together.
        RETURNS (List[Completion]): In the order given.
        RAISES: SamError S505 if a prompt leaves no room for an answer, S510 if the worker fails, S511 in a forked process, S205
            if the entity bias cannot be had with these labels.
        """
        if os.getpid() != self._pid:
            raise SamError("S511")
        with self._lock.held():
            return self._generate(of_versions(requests, self.bank))

    def _generate(self, requests: Sequence[Request]) -> List[Completion]:
        groups: Dict[str, List[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(request.task_model.fingerprint, []).append(place)
        done: Dict[int, Completion] = {}
        for name in sorted(groups, key=lambda name: name != self._active):  # first the one that is loaded
            places = groups[name]
            done.update(zip(places, self._complete([requests[place] for place in places])))
        return [done[place] for place in range(len(requests))]

    def close(self) -> None:
        """End the worker, when it has done what it does. The next request starts another one."""
        with self._lock.held():
            self._active = None
            if self._worker is not None:
                self._worker.close()
            self._worker = None

    def _complete(self, requests: Sequence[Request]) -> List[Completion]:
        """Complete requests of one task model."""
        prefixes = {labels: self.encoder.prefix(labels) for labels in {request.labels for request in requests}}
        biases = {labels: self._bias(labels) for labels in prefixes}
        prompts = [self._prompt(request, prefixes[request.labels], biases[request.labels]) for request in requests]
        self._use(requests[0].task_model)
        reply = self._ask(do="generate", prompts=prompts, end_ids=list(self.end_ids))
        return [read_completion(self.encoder, a["ids"], a["logprobs"], self.end_ids) for a in reply["answers"]]

    def _prompt(self, request: Request, prefix: List[int], bias: List[Tuple[int, float]]) -> Dict[str, Any]:
        """What the worker is told of a request."""
        body = self.encoder.body(request.text)
        n_prompt = len(prefix) + len(body)
        if n_prompt >= self.context:
            raise SamError("S505", n_tokens=n_prompt, context=self.context)
        limit = answer_limit(len(body), self.context - n_prompt, self.max_new_tokens)
        grammar = write_grammar(self.grammar, request.labels, request.text) if self.grammar is not None else None
        return {"ids": [*prefix, *body], "limit": limit, "grammar": grammar, "bias": bias}

    def _bias(self, labels: Sequence[str]) -> List[Tuple[int, float]]:
        return list(bias_logits(self.grammar, labels, self.entity_bias).items()) if self.grammar is not None else []

    def _use(self, spec: TaskModelSpec) -> None:
        """Have the worker load a task model, or switch to it."""
        if spec.fingerprint == self._active:
            return
        self._ask(do="use", folder=str(self._folders.folder(spec)), settings=self._settings)
        self._active = spec.fingerprint

    def _ask(self, **question: Any) -> Dict[str, Any]:
        if self._worker is None:
            self._worker = Worker(self._python)
        try:
            return self._worker.ask(question)
        except BaseException:  # the worker is closed then
            self._active = self._worker = None
            raise


class Worker:
    """A process that runs `vllm_worker`, and what it says on standard error."""

    def __init__(self, python: str) -> None:
        """Start it. RAISES: SamError S509 if the interpreter is not there or has no vLLM, S510 if it fails otherwise."""
        messages = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed with the process
        try:
            process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                encoding="ascii",
                start_new_session=True,  # an interrupt at the keyboard is for us, and we end the worker
            )
        except OSError as error:
            messages.close()
            raise SamError("S509", python=python, reason=error) from error
        self._process = process
        self._messages = messages
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _in_process, self._pid, _end, process, messages, PATIENCE)
        missing = self._answer(None).get("missing")
        if missing is not None:
            self.close()
            raise SamError("S509", python=python, reason=missing)

    def ask(self, question: Dict[str, Any]) -> Dict[str, Any]:
        """Ask, and wait for the answer. RAISES: SamError S510 if the worker fails or has ended; it is closed then."""
        return self._answer(json.dumps(question) + "\n")

    def close(self, patience: float = PATIENCE) -> None:
        """End the process: by itself if it can within some seconds, else by force."""
        if self._finalizer.detach() is not None:
            _in_process(self._pid, _end, self._process, self._messages, patience)

    def _answer(self, question: Optional[str]) -> Dict[str, Any]:
        try:
            return self._exchange(question)
        except SamError:
            self.close()
            raise
        except BaseException:  # an interrupt: the worker is still at work
            self.close(0)
            raise

    def _exchange(self, question: Optional[str]) -> Dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if question is not None:
                self._process.stdin.write(question)
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer: Dict[str, Any] = json.loads(line) if line else {"error": "it has ended"}
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, reason: object) -> SamError:
        _stop(self._process, PATIENCE)  # so that its last words are written
        size = os.fstat(self._messages.fileno()).st_size
        # Not by seeking: the worker writes where this file stands.
        last = os.pread(self._messages.fileno(), MAX_MESSAGES, max(0, size - MAX_MESSAGES))
        lines = last.decode("utf8", errors="replace").splitlines()
        return SamError("S510", reason=reason, messages="\n".join(lines[-N_LINES:]))


def _end(process: "subprocess.Popen[str]", messages: IO[bytes], patience: float) -> None:
    """End a worker's process, and close what was open for it."""
    assert process.stdout is not None
    _stop(process, patience)
    process.stdout.close()
    messages.close()


def _stop(process: "subprocess.Popen[str]", patience: float) -> None:
    """End the input of a process, which ends it, or end it by force after some seconds."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # what it was not sent yet cannot be sent if it has ended
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read_base(source: str, revision: Optional[str]) -> Tuple[Any, Any, Any]:
    """Config, tokenizer and generation config of a base. RAISES: SamError S503 if they cannot be read."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise SamError("S503", path=source, reason=error) from error
    try:
        generation = GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:  # there need not be one: transformers makes it of the config, too
        generation = GenerationConfig.from_model_config(config)
    return config, tokenizer, generation


def _refuse_others(config: Any) -> None:
    """RAISES: SamError S508 if the base is no causal language model."""
    if is_tagger(config):
        raise SamError("S508", kind="a tagger")
    if config.is_encoder_decoder:
        raise SamError("S508", kind="an encoder-decoder")


def _in_process(pid: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a function in the process that has the right to: forked ones have copies of everything."""
    if os.getpid() == pid:
        function(*args, **kwargs)
