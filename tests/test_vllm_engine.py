"""The vLLM engine and its worker, with a stand-in for vLLM itself (`fake_vllm`); `test_vllm_real` has the real one."""

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
import torch
from helpers import make_card, make_tiny_bank, save_adapter
from safetensors.torch import load_file
from spacy import registry
from transformers import AutoTokenizer

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate import vllm_engine
from spacy_sam.generate.engine import Engine, Request
from spacy_sam.generate.lark import write_grammar
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.generate.vllm_engine import VLLMEngine
from spacy_sam.merge.methods import Mean, Ties
from spacy_sam.plan import Plan, TaskModelSpec
from spacy_sam.registered import make_vllm_engine, resolve_method

BASE, ONE = TaskModelSpec(), TaskModelSpec(("expert1",))
MEAN = TaskModelSpec(("expert0", "expert2"), (), Mean().config)
TIES = TaskModelSpec(("expert0", "expert1", "expert2"), (), Ties(0.4).config)
LABELS, OTHER_LABELS = ("person", "place"), ("river", "tall mountain", "lake")
TEXTS = ("Anna Keller moved from Bern to a small town.", "Hi", "", "Café Zürich\n東京 😀 <|end|>")
FAKE = Path(__file__).parent / "fake_vllm"
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="runs a shell script")


@pytest.fixture
def log(tmp_path, monkeypatch) -> Callable[[], List[Dict[str, Any]]]:
    """What the stand-in was asked so far. Workers find it in place of vLLM."""
    file = tmp_path / "log.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("FAKE_VLLM_LOG", str(file))
    monkeypatch.delenv("FAKE_VLLM", raising=False)
    return lambda: [event for event in read(file) if event["do"] not in ("import", "end")]


def read(file: Path) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf8").splitlines()]


@pytest.fixture
def bank(tiny_bank_path) -> ExpertBank:
    return ExpertBank(tiny_bank_path)


@pytest.fixture
def make(bank, log) -> Iterator[Callable[..., VLLMEngine]]:
    """Makes engines that are closed after the test."""
    engines: List[VLLMEngine] = []

    def make_engine(bank: ExpertBank = bank, **settings: Any) -> VLLMEngine:
        engines.append(VLLMEngine(bank, resolve_method, **settings))
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make) -> VLLMEngine:
    return make()


def mixture() -> List[Request]:
    return [
        Request(spec, labels, text) for text in TEXTS for labels in (LABELS, OTHER_LABELS) for spec in (BASE, ONE, MEAN)
    ]


def process_of(engine: VLLMEngine) -> Any:
    worker = engine._worker
    assert worker is not None
    return worker._process


def kinds(events: List[Dict[str, Any]]) -> List[str]:
    return [event["do"] for event in events]


# Questions


def test_engine_is_one(bank, engine):
    other = TorchEngine(bank, resolve_method, device="cpu")
    assert isinstance(engine, Engine)
    assert engine.context == other.context == 512
    assert engine.prompt_length(LABELS) == other.prompt_length(LABELS)
    assert engine.token_starts(TEXTS[3]) == other.token_starts(TEXTS[3])
    assert engine.end_ids == other.end_ids
    assert engine.has_entity_bias


def test_prompts_are_those_of_the_bank(bank, engine, log):
    tokenizer = AutoTokenizer.from_pretrained(bank.base[0])
    engine.entity_bias = 2.0
    requests = [Request(ONE, labels, text) for labels in (LABELS, OTHER_LABELS) for text in TEXTS]
    engine.generate(requests)
    for request, asked in zip(requests, log()[-1]["prompts"], strict=True):
        prompt_format = engine.encoder.format
        parts = prompt_format.prefix(request.labels), prompt_format.body(request.text)
        prefix, body = (tokenizer(part, split_special_tokens=True)["input_ids"] for part in parts)
        assert asked["ids"] == prefix + body
        assert asked["max_tokens"] == min(320, 3 * len(body) + 16)
        assert asked["grammar"] == write_grammar(engine.grammar, request.labels, request.text)
        assert asked["stop_token_ids"] == [tokenizer.eos_token_id]
        assert asked["logit_bias"] == {str(tokenizer.eos_token_id): -2.0}
        assert (asked["temperature"], asked["logprobs"], asked["detokenize"]) == (0, 0, False)


def test_limit_keeps_to_the_context(make, log):
    engine = make(max_new_tokens=7)
    engine.generate([Request(BASE, LABELS, TEXTS[0])])
    assert log()[-1]["prompts"][0]["max_tokens"] == 7
    engine.max_new_tokens = 10_000
    engine.generate([Request(BASE, LABELS, "word " * 80)])
    (asked,) = log()[-1]["prompts"]
    assert asked["max_tokens"] == 512 - len(asked["ids"])


def test_prompt_without_room_is_refused(engine):
    with pytest.raises(SamError) as caught:
        engine.generate([Request(BASE, LABELS, "word " * 600)])
    assert caught.value.code == "S505"


def test_without_grammar(make, log):
    engine = make(constrained=False, entity_bias=1.0)
    engine.generate(mixture())
    assert not engine.has_entity_bias
    prompts = [prompt for event in log() if event["do"] == "generate" for prompt in event["prompts"]]
    assert {(prompt["grammar"], prompt["logit_bias"]) for prompt in prompts} == {(None, None)}


def test_model_is_loaded_as_set(bank, make, log, monkeypatch):
    engine = make(options={"tensor_parallel_size": 2, "max_model_len": 300, "enable_prefix_caching": False})
    assert engine.context == 300
    engine.generate([Request(BASE, LABELS, "Hi")])
    expected = {"model": bank.base[0], "max_model_len": 300, "tensor_parallel_size": 2, "dtype": "float32"}
    settings = log()[0]["settings"]
    assert {name: settings[name] for name in expected} == expected
    assert settings["enable_prefix_caching"] is False
    assert settings["structured_outputs_config"] == {"backend": "guidance"}
    monkeypatch.setenv("FAKE_VLLM_PLATFORM", "cuda")
    for number, dtype in enumerate((None, "float16")):
        engine = make(dtype=dtype)
        engine.generate([Request(BASE, LABELS, "Hi")])
        settings = [event for event in log() if event["do"] == "load"][1 + number]["settings"]
        assert (settings["dtype"], settings["max_model_len"]) == (dtype or "bfloat16", 512)
        assert settings["enable_prefix_caching"] is True


def test_worker_does_not_find_our_modules(engine, log, tmp_path):
    """Some of them have names that vLLM imports."""
    first = read(tmp_path / "log.jsonl")[0]
    assert first["do"] == "import"
    assert str(Path(vllm_engine.__file__).parent) not in first["path"]


# Answers


def test_answers_come_in_the_order_given(engine):
    requests = mixture()
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        expected = engine.encoder.decode(engine.encoder.body(request.text)[-3:])
        assert completion.text == expected[0]
        assert completion.ends == (*expected[1], len(completion.text))
        assert completion.finished
    assert engine.generate([]) == []


def test_unfinished_answers(make):
    (completion,) = make(max_new_tokens=3).generate([Request(ONE, LABELS, TEXTS[0])])
    assert not completion.finished
    assert completion.logprobs == (-0.5,) * 3
    assert len(completion.ends) == 3


# Task models


def test_each_task_model_is_loaded_once_a_call(engine, log):
    first = engine.generate(mixture())
    assert kinds(log()) == ["load", "generate", *["reload_weights", "reset_prefix_cache", "generate"] * 2]
    assert [completion.logprobs[0] for completion in first[:3]] == [-0.5, -1.0, -1.5]
    # The one that is loaded (MEAN) goes first.
    second = engine.generate(mixture())
    assert kinds(log()[8:]) == ["generate", *["reload_weights", "reset_prefix_cache", "generate"] * 2]
    assert [completion.logprobs[0] for completion in second[:3]] == [-2.0, -2.5, -1.5]


def test_folders_hold_what_the_torch_engine_runs(bank, make, log, tmp_path):
    engine = make(cache=str(tmp_path / "cache"))
    torch_engine = TorchEngine(bank, resolve_method, device="cpu")
    for spec in (ONE, MEAN, TIES):
        engine.generate([Request(spec, LABELS, "Hi")])
        last = [event for event in log() if event["do"] in ("load", "reload_weights")][-1]
        folder = Path(last["settings"]["model"] if last["do"] == "load" else last["weights_path"])
        assert folder.parent == tmp_path / "cache"
        torch_engine.switch.use(spec)
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == dict(torch_engine.model.named_parameters()).keys()
        for name, parameter in torch_engine.model.named_parameters():
            assert torch.equal(weights[name], parameter)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == engine.encoder.tokenizer.get_vocab()


def test_base_is_run_where_it_is(bank, make, log, tmp_path):
    make(cache=str(tmp_path / "cache")).generate([Request(BASE, LABELS, "Hi")])
    assert log()[0]["settings"]["model"] == bank.base[0]
    assert not (tmp_path / "cache").exists()


def modified(cache: Path) -> Dict[str, int]:
    return {path.name: (path / "model.safetensors").stat().st_mtime_ns for path in cache.iterdir()}


def test_cache_is_found_again(make, tmp_path):
    cache = tmp_path / "cache"
    make(cache=str(cache)).generate(mixture())
    before = modified(cache)
    assert len(before) == 2
    make(cache=str(cache)).generate(mixture())
    assert modified(cache) == before


def test_cache_keeps_what_was_used_last(make, tmp_path):
    cache = tmp_path / "cache"
    engine = make(cache=str(cache), max_task_models=2)
    (tmp_path / "cache" / "of something else").mkdir(parents=True)
    names: Dict[TaskModelSpec, str] = {}
    for number, spec in enumerate((ONE, MEAN, ONE, TIES)):
        known = set(names.values())
        engine.generate([Request(spec, LABELS, "Hi")])
        for name in {path.name for path in cache.iterdir()} - known - {"of something else"}:
            names[spec.name] = name
        os.utime(cache / names[spec.name], (number, number))  # file times are coarse
    assert {path.name for path in cache.iterdir()} == {names[ONE.name], names[TIES.name], "of something else"}


def test_cache_knows_experts_by_their_content(bank_copy, make, tmp_path):
    cache = tmp_path / "cache"
    make(bank_copy, cache=str(cache)).generate([Request(ONE, LABELS, "Hi")])
    (first,) = cache.iterdir()
    bank_copy.remove("expert1")
    adapter = save_adapter(tmp_path / "adapter", bank_copy.base[0], seed=77)
    bank_copy.add("expert1", adapter, make_card(bank_copy, 1))
    make(bank_copy, cache=str(cache)).generate([Request(ONE, LABELS, "Hi")])
    assert len(list(cache.iterdir())) == 2
    assert first in cache.iterdir()


def replaced(bank: ExpertBank, folder: Path, seed: int) -> None:
    """Another `expert1` takes the place of the first."""
    bank.remove("expert1")
    bank.add("expert1", save_adapter(folder / str(seed), bank.base[0], seed=seed), make_card(bank, 1))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("merged_before", [True, False])
def test_running_engine_knows_versions(bank_copy, make, log, tmp_path, held, merged_before):
    """A version that is gone from the bank is served from its folder, or merged from memory as long as somebody holds it."""
    engine = make(bank_copy)
    plan = Plan(bank_copy.base_hash, (ONE,), {"expert1": bank_copy.adapter_hash("expert1")})
    adapters = bank_copy.hold(plan) if held else None
    torch_engine = TorchEngine(bank_copy, resolve_method, device="cpu")
    torch_engine.switch.use(ONE)
    old = [Request(plan.versions[0], LABELS, "Hi")]
    if merged_before:
        engine.generate(old)
    replaced(bank_copy, tmp_path, 77)
    engine.generate([Request(ONE, LABELS, "Hi")])
    if not (held or merged_before):
        with pytest.raises(SamError) as caught:
            engine.generate(old)
        assert caught.value.code == "S413"
        return
    engine.generate(old)
    loads = [event for event in log() if event["do"] in ("load", "reload_weights")]
    folders = [event["settings"]["model"] if event["do"] == "load" else event["weights_path"] for event in loads]
    assert len(set(folders)) == 2
    weights = load_file(Path(folders[-1]) / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in torch_engine.model.named_parameters())
    assert adapters is None or "expert1" in adapters


def test_threads_share_an_engine(engine):
    """One at a time asks the worker: answers are not mixed up."""
    expected = engine.generate(mixture())
    found: List[Any] = []
    threads = [threading.Thread(target=lambda: found.append(engine.generate(mixture()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 4
    for answers in found:
        assert [answer.text for answer in answers] == [answer.text for answer in expected]


def test_half_a_task_model_is_not_kept(make, tmp_path, monkeypatch):
    engine = make(cache=str(tmp_path / "cache"))
    monkeypatch.setattr("spacy_sam.merge.shards.open_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([Request(ONE, LABELS, "Hi")])
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.undo()


# What goes wrong


@pytest.mark.parametrize("architecture", ["bart", "tagger"])
def test_other_bases_are_refused(make, tmp_path, architecture):
    other = make_tiny_bank(tmp_path / architecture, 1, architecture, prompt={"name": "spacy_sam.Inline.v1"})
    with pytest.raises(SamError) as caught:
        make(other)
    assert caught.value.code == "S508"
    assert "TorchEngine" in str(caught.value)


def test_no_such_interpreter(make, tmp_path):
    with pytest.raises(SamError) as caught:
        make(python=str(tmp_path / "python"))
    assert caught.value.code == "S509"


def test_interpreter_without_vllm(make, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "import: miss")
    with pytest.raises(SamError) as caught:
        make()
    assert caught.value.code == "S509"
    assert f"{sys.executable} has no vLLM that can be used: No module named 'something'" in str(caught.value)
    assert "docs/vllm.md" in str(caught.value)


def script(folder: Path, line: str) -> str:
    file = folder / "script"
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return str(file)


@needs_shell
@pytest.mark.parametrize(
    "line", ["echo Usage: >&2; exit 2", "echo Usage:; echo Usage: >&2", "echo 'caf\\303\\251'; echo Usage: >&2"]
)
def test_something_else_than_an_interpreter(make, tmp_path, line):
    with pytest.raises(SamError) as caught:
        make(python=script(tmp_path, line))
    assert caught.value.code == "S510"
    assert "Usage:" in str(caught.value)


@pytest.mark.parametrize("when", ["load", "generate", "reload_weights"])
@pytest.mark.parametrize(("what", "said"), [("die", "it has ended"), ("fail", "RuntimeError: no room for the cache")])
def test_worker_fails(make, log, monkeypatch, when, what, said):
    monkeypatch.setenv("FAKE_VLLM", f"{when}: {what}")
    engine = make()
    process = process_of(engine)
    with pytest.raises(SamError) as caught:
        engine.generate(mixture())
    assert caught.value.code == "S510"
    assert said in str(caught.value)
    assert "Segmentation fault" in str(caught.value) if what == "die" else "Traceback" in str(caught.value)
    assert process.poll() is not None
    # The next call has a worker of its own.
    monkeypatch.delenv("FAKE_VLLM")
    n_before = len(log())
    assert len(engine.generate(mixture())) == len(mixture())
    assert kinds(log()[n_before:])[:2] == ["load", "generate"]


def test_worker_that_was_killed(engine):
    process_of(engine).kill()
    process_of(engine).wait()
    with pytest.raises(SamError) as caught:
        engine.generate([Request(ONE, LABELS, "Hi")])
    assert caught.value.code == "S510"
    assert engine.generate([Request(ONE, LABELS, "Hi")])


def test_long_messages_are_cut(engine, monkeypatch):
    process = process_of(engine)
    os.pwrite(engine._worker._messages.fileno(), b"line\n" * 100_000 + "äöü\n".encode() * 9000 + b"last", 0)
    process.kill()
    with pytest.raises(SamError) as caught:
        engine.generate([Request(ONE, LABELS, "Hi")])
    messages = str(caught.value.fields["messages"])
    assert messages.endswith("last")
    assert messages.count("\n") < 20


def test_interrupt_ends_the_worker(engine, monkeypatch):
    engine.generate([Request(ONE, LABELS, "Hi")])
    process = process_of(engine)
    monkeypatch.setattr(vllm_engine.json, "loads", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(ONE, LABELS, "Hi")])
    monkeypatch.undo()
    assert process.poll() is not None


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_forked_process_has_no_worker(engine, monkeypatch):
    engine.generate([Request(ONE, LABELS, "Hi")])
    worker, process, real = engine._worker, process_of(engine), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: real + 1)
    with pytest.raises(SamError) as caught:
        engine.generate([Request(ONE, LABELS, "Hi")])
    assert caught.value.code == "S511"
    engine.close()
    assert process.poll() is None, "it belongs to the parent"
    monkeypatch.undo()
    vllm_engine._end(process, worker._messages, 30)


# The end


def test_close_ends_the_worker(engine):
    engine.generate([Request(ONE, LABELS, "Hi")])
    process = process_of(engine)
    engine.close()
    engine.close()
    assert process.returncode == 0
    assert engine.generate([Request(ONE, LABELS, "Hi")])


def test_worker_ends_with_the_engine(bank, log):
    engine = VLLMEngine(bank, resolve_method)
    engine.generate([Request(ONE, LABELS, "Hi")])
    process, cache = process_of(engine), engine._folders.root
    assert cache.is_dir()
    del engine
    gc.collect()
    assert process.returncode == 0
    assert not cache.exists()


def test_worker_that_stays_is_ended(engine, monkeypatch):
    engine.close()
    monkeypatch.setenv("FAKE_VLLM", "load: stay")
    monkeypatch.setattr(vllm_engine, "PATIENCE", 0.2)
    engine.generate([Request(BASE, LABELS, "Hi")])
    process = process_of(engine)
    engine._worker.close(0.2)
    assert process.returncode not in (0, None)


def test_worker_ends_when_we_are_killed(bank, log, tmp_path):
    """Its input ends then."""
    code = f"""
import os, signal
from spacy_sam.bank import ExpertBank
from spacy_sam.generate.vllm_engine import VLLMEngine
engine = VLLMEngine(ExpertBank({str(bank.path)!r}), None, cache={str(tmp_path)!r})
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKE), *sys.path])}
    subprocess.run([sys.executable, "-c", code], timeout=240, env=environment, check=False)
    stop = time.monotonic() + 60
    while read(tmp_path / "log.jsonl")[-1]["do"] != "end":
        assert time.monotonic() < stop
        time.sleep(0.05)


# Settings


@pytest.mark.parametrize("setting", ["max_new_tokens", "max_task_models"])
@pytest.mark.parametrize("value", [0, -1, "128", 1.5, True])
def test_bad_numbers_are_refused_before_anything(setting, value):
    with pytest.raises(SamError) as caught:
        make_vllm_engine(**{setting: value})
    assert caught.value.code == "S205"
    assert caught.value.fields["setting"] == setting


def test_unknown_dtype(make):
    with pytest.raises(SamError) as caught:
        make(dtype="int8")
    assert caught.value.code == "S502"


def test_base_without_tokenizer(bank_copy, make):
    (Path(bank_copy.base[0]) / "tokenizer_config.json").write_text("{")
    with pytest.raises(SamError) as caught:
        make(bank_copy)
    assert caught.value.code == "S503"
    shutil.rmtree(bank_copy.base[0])
    with pytest.raises(SamError) as caught:
        make(bank_copy)
    assert caught.value.code == "S503"


def test_maker_is_registered_and_can_be_pickled(bank, log):
    config = {"@misc": "spacy_sam.VLLMEngine.v1", "max_new_tokens": 5, "options": {"seed": 3}}
    maker = pickle.loads(pickle.dumps(registry.resolve({"engine": config})["engine"]))
    engine = maker(bank)
    assert engine.generate([Request(BASE, LABELS, "Hi there")])
    assert log()[0]["settings"]["seed"] == 3
    assert log()[1]["prompts"][0]["max_tokens"] == 5
    engine.close()
