"""The torch engine on tiny random models: what it writes is what transformers writes, however it is batched."""

import itertools
import json
import math
import pickle
import random
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import pytest
import torch
from helpers import END, PAD, load_model, make_tiny_bank
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate import torch_engine
from spacy_sam.generate.engine import Completion, Engine, Request
from spacy_sam.generate.torch_engine import TorchEngine, resolve_device
from spacy_sam.merge.methods import Mean, Ties
from spacy_sam.plan import TaskModelSpec
from spacy_sam.prompts import make_format
from spacy_sam.registered import make_torch_engine, resolve_method

ARCHITECTURES = ("llama", "opt", "bart")
BASE, ONE = TaskModelSpec(), TaskModelSpec(("expert1",))
MEAN = TaskModelSpec(("expert0", "expert2"), (), Mean().config)
TIES = TaskModelSpec(("expert0", "expert1", "expert2"), (), Ties(0.4).config)
LABELS, OTHER_LABELS = ("person", "place"), ("river", "tall mountain", "lake")
TEXTS = (
    "Anna Keller moved from Bern to a small town near Lisbon last spring.",
    "Hi",
    "",
    "In Nairobi, Grace Wanjiru opened a school; in Kyoto, her brother Daniel runs a bakery.\n\nCafé Zürich",
    f"A {END} is only text, and so is {PAD}.",
    "東京 😀 is far.",
)
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture(scope="module")
def banks(tmp_path_factory, tiny_bank_path) -> Dict[str, ExpertBank]:
    folder = tmp_path_factory.mktemp("engine")
    others = {name: make_tiny_bank(folder / name, architecture=name, seed=1) for name in ("opt", "bart")}
    return {"llama": ExpertBank(tiny_bank_path), **others}


@pytest.fixture(params=ARCHITECTURES)
def bank(request, banks) -> ExpertBank:
    return banks[request.param]


@pytest.fixture
def engine(bank) -> TorchEngine:
    return make_engine(bank)


def make_engine(bank: ExpertBank, **settings: Any) -> TorchEngine:
    """An engine without a grammar and with many end tokens, so that a random model finishes some answers, at several lengths."""
    engine = TorchEngine(
        bank, resolve_method, **{"device": "cpu", "max_new_tokens": 24, "constrained": False, **settings}
    )
    engine.end_ids = (*engine.end_ids, *range(3, 400, 14))
    return engine


def mixture() -> List[Request]:
    specs = (BASE, ONE, MEAN, TIES)
    return [Request(s, ls, text) for text in TEXTS for ls in (LABELS, OTHER_LABELS) for s in specs]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [(c.text, c.ends, c.finished) for c in found] == [(c.text, c.ends, c.finished) for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


# The same as transformers


class Reference(NamedTuple):
    """One task model as a model of its own, and its tokenizer."""

    model: Any
    tokenizer: Any
    bank: ExpertBank

    def prompt(self, request: Request) -> List[int]:
        prompt_format = make_format(self.bank.prompt)
        parts = prompt_format.prefix(request.labels), prompt_format.body(request.text)
        return [i for part in parts for i in self.tokenizer(part, split_special_tokens=True)["input_ids"]]

    def generate(self, request: Request, limit: int, end_ids: Sequence[int]) -> Tuple[List[int], List[float]]:
        return self.continue_ids(self.prompt(request), limit, end_ids)

    def continue_ids(self, prompt: Sequence[int], limit: int, end_ids: Sequence[int]) -> Tuple[List[int], List[float]]:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=list(end_ids),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        n_given = 1 if self.model.config.is_encoder_decoder else ids.shape[1]
        tokens = output.sequences[0, n_given:].tolist()
        logprobs = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, tokens)]
        return tokens, logprobs


def make_reference(bank: ExpertBank, spec: TaskModelSpec) -> Reference:
    """Adds the mean of the experts' task vectors, by hand."""
    model = load_model(bank.base[0])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in spec.experts:
            for matrix, factors in bank.load_adapter(name).matrices.items():
                parameters[matrix] += factors.delta() / len(spec.experts)
    return Reference(model, AutoTokenizer.from_pretrained(bank.base[0]), bank)


@pytest.mark.parametrize("spec", [BASE, ONE, MEAN], ids=["base", "one", "mean"])
def test_engine_writes_what_transformers_writes(bank, engine, spec):
    reference = make_reference(bank, spec)
    requests = [Request(spec, labels, text) for text in TEXTS for labels in (LABELS, OTHER_LABELS)]
    completions = engine.generate(requests)
    for request, completion in zip(requests, completions, strict=True):
        n_tokens = len(completion.logprobs)
        more = 5 if completion.finished else 0
        tokens, logprobs = reference.generate(request, n_tokens + more, engine.end_ids)
        assert len(tokens) == n_tokens
        assert (tokens[-1] in engine.end_ids) == completion.finished
        content = tokens[:-1] if completion.finished else tokens
        assert completion.text == reference.tokenizer.decode(content, skip_special_tokens=True)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)


def test_engine_completes_whole_prompts(bank, engine):
    reference = make_reference(bank, ONE)
    prompts = ["Say something nice.\n", "Hi", f"{END} is text", " ".join(TEXTS) * 2]
    for prompt, completion in zip(prompts, engine.complete(ONE, prompts), strict=True):
        ids = reference.tokenizer(prompt, split_special_tokens=True)["input_ids"]
        tokens, logprobs = reference.continue_ids(ids, len(completion.logprobs), engine.end_ids)
        content = tokens[:-1] if completion.finished else tokens
        assert completion.text == reference.tokenizer.decode(content, skip_special_tokens=True)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)
    with pytest.raises(SamError) as caught:
        engine.complete(ONE, ["Hi", "word " * 600])
    assert caught.value.code == "S505"


def test_engine_task_models_differ(engine):
    answers = [engine.generate([Request(spec, LABELS, TEXTS[0])])[0] for spec in (BASE, ONE, MEAN, TIES)]
    assert len({answer.text for answer in answers}) == 4
    assert engine.generate([Request(ONE, OTHER_LABELS, TEXTS[0])])[0] != answers[1]


# Batches


@pytest.fixture(scope="module")
def expected(banks) -> Dict[str, List[Completion]]:
    """The mixture's completions, each generated alone."""
    engines = {name: make_engine(bank) for name, bank in banks.items()}
    return {name: [engine.generate([r])[0] for r in mixture()] for name, engine in engines.items()}


@pytest.mark.parametrize("tokens_per_batch", [8192, 300, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_batches_do_not_matter(banks, expected, architecture, tokens_per_batch):
    assert {completion.finished for completion in expected[architecture]} == {True, False}, (
        "rows leave at different times"
    )
    engine = make_engine(banks[architecture], tokens_per_batch=tokens_per_batch)
    assert_same(engine.generate(mixture()), expected[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_answers_in_the_order_given(banks, expected, architecture):
    engine = make_engine(banks[architecture])
    pairs = list(zip(mixture(), expected[architecture], strict=True))
    for seed in range(2):  # the second time with the prefixes and merged weights of the first
        random.Random(seed).shuffle(pairs)
        assert_same(engine.generate([request for request, _ in pairs]), [completion for _, completion in pairs])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_calls_do_not_matter(banks, expected, architecture, monkeypatch):
    """Prefixes that were encoded before are used again, and forgotten when there are too many."""
    monkeypatch.setattr(torch_engine, "MAX_PREFIXES", 3)
    engine = make_engine(banks[architecture])
    pairs = list(zip(mixture(), expected[architecture], strict=True))
    for start in range(0, len(pairs), 5):
        some = pairs[start : start + 5]
        assert_same(engine.generate([request for request, _ in some]), [completion for _, completion in some])


def test_engine_same_request_twice(engine):
    request = Request(ONE, LABELS, TEXTS[0])
    first, second, third = engine.generate([request, request, request])
    assert_same([first, third], [second, second])


def test_engine_nothing_to_do(engine):
    assert engine.generate([]) == []


def test_engine_finished_rows_leave(engine, monkeypatch):
    """Each row is run once for each of its tokens, and not again."""
    requests = [Request(ONE, LABELS, text) for text in TEXTS]
    engine.generate(requests[:1])  # encodes the prefix of a causal model
    rows = watch_rows(engine, monkeypatch, most=99)
    completions = engine.generate(requests)
    n_tokens = [len(completion.logprobs) for completion in completions]
    assert rows == [sum(n > step for n in n_tokens) for step in range(max(n_tokens))]
    assert rows[0] == len(TEXTS) > rows[-1]


def watch_rows(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, most: int, fail_at: int = -1) -> List[int]:
    """Rows of each forward call. Those with more than `most` rows, and the one numbered `fail_at`, find no memory."""
    rows: List[int] = []
    forward = engine.model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["decoder_input_ids" if engine.model.config.is_encoder_decoder else "input_ids"]))
        if rows[-1] > most or len(rows) - 1 == fail_at:
            raise torch.OutOfMemoryError("no memory left, says the test")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", limited)
    return rows


def test_engine_out_of_memory_halves_the_batch(bank, engine, monkeypatch, caplog):
    requests = [Request(ONE, LABELS, f"Lena met Jakob in Prague on day {n}.") for n in range(8)]
    expected = engine.generate(requests)
    rows = watch_rows(engine, monkeypatch, most=2)
    assert_same(engine.generate(requests), expected)
    assert rows[:2] == [8, 4], "each time the memory runs out, half as many rows should be tried"
    assert rows[2] in (1, 2)
    assert len([n for n in rows if n > 2]) == 2
    assert "Out of memory" in caplog.text
    del rows[:]
    assert_same(engine.generate(requests), expected)
    assert max(rows) <= 2, "what did not fit once is not tried again"


@pytest.mark.parametrize("architecture", ["llama", "bart"])
@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_engine_out_of_memory_at_any_step(banks, monkeypatch, architecture, fail_at):
    """While a causal model's prefix is encoded (0), at the first token (1), and later."""
    requests = [Request(ONE, LABELS, text) for text in TEXTS]
    expected = make_engine(banks[architecture]).generate(requests)
    engine = make_engine(banks[architecture])
    watch_rows(engine, monkeypatch, most=99, fail_at=fail_at)
    assert_same(engine.generate(requests), expected)


def test_engine_out_of_memory_with_one_row(engine, monkeypatch):
    watch_rows(engine, monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([Request(ONE, LABELS, text) for text in TEXTS])


def test_engine_base_comes_back(bank, engine):
    base = load_file(Path(bank.base[0]) / "model.safetensors")
    engine.generate(mixture())
    engine.switch.restore()
    parameters = dict(engine.model.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in base.items() if name in parameters)
    assert set(parameters) <= set(base)


# Completions


def test_completion_score_is_the_product():
    logprobs = tuple(math.log(p) for p in (0.5, 0.2, 0.8, 0.1))
    completion = Completion("Rome | place", logprobs, (4, 6, 12, 12), True)
    assert completion.score(0, 4) == pytest.approx(0.5)
    assert completion.score(0, 6) == pytest.approx(0.5 * 0.2)
    assert completion.score(0, 12) == pytest.approx(0.5 * 0.2 * 0.8), "the end token is no part of it"
    assert completion.score(3, 5) == pytest.approx(0.5 * 0.2), "a token counts whole"
    assert completion.score(4, 6) == pytest.approx(0.2)
    assert completion.score(12, 20) == 0.0
    assert Completion("", (), (), False).score(0, 1) == 0.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completion_parts_fit_together(expected, architecture):
    for completion in expected[architecture]:
        assert len(completion.logprobs) == len(completion.ends) >= 1
        assert all(logprob <= 1e-6 for logprob in completion.logprobs)
        begins = (0, *completion.ends[:-1])
        assert all(0 <= begin <= end for begin, end in zip(begins, completion.ends))
        assert completion.ends[-1] == len(completion.text)
        pieces = [completion.text[begin:end] for begin, end in zip(begins, completion.ends)]
        assert "".join(pieces) == completion.text
        for start, end in itertools.combinations(range(0, len(completion.text) + 1, 7), 2):
            assert 0 <= completion.score(start, end) <= 1


def test_engine_ends_are_those_of_the_tokens(bank, engine):
    """Each token's own text stands where `ends` says, if the completion has no broken characters."""
    reference = make_reference(bank, ONE)
    n_checked = 0
    for text in TEXTS:
        request = Request(ONE, LABELS, text)
        (completion,) = engine.generate([request])
        if "�" in completion.text:
            continue
        tokens, _ = reference.generate(request, len(completion.logprobs), engine.end_ids)
        written = [reference.tokenizer.decode([t], skip_special_tokens=True) for t in tokens]
        if completion.finished:
            written[-1] = ""
        assert list(completion.ends) == list(itertools.accumulate(map(len, written)))
        n_checked += 1
    assert n_checked


def test_engine_token_limit(bank):
    engine = TorchEngine(bank, resolve_method, device="cpu", max_new_tokens=3, constrained=False)
    engine.end_ids = ()
    for completion in engine.generate([Request(ONE, LABELS, text) for text in TEXTS]):
        assert len(completion.logprobs) == 3
        assert not completion.finished


def test_engine_limit_counts_the_end_token(bank):
    """An answer whose end token is the last that fits is finished."""
    long = make_engine(bank, max_new_tokens=24)
    requests = [Request(ONE, LABELS, text) for text in TEXTS]
    for request, completion in zip(requests, long.generate(requests)):
        n_tokens = len(completion.logprobs)
        if completion.finished and n_tokens > 1:
            engine = make_engine(bank, max_new_tokens=n_tokens)
            assert_same(engine.generate([request]), [completion])
            engine.max_new_tokens -= 1
            (cut,) = engine.generate([request])
            assert not cut.finished
            assert completion.text.startswith(cut.text) or "�" in cut.text
            return
    pytest.fail("no answer is finished")


# Prompts


def test_engine_lengths(bank, engine):
    tokenizer = AutoTokenizer.from_pretrained(bank.base[0])
    assert isinstance(engine, Engine)
    assert engine.context == 512
    prompt = Reference(None, tokenizer, bank).prompt(Request(BASE, LABELS, ""))
    assert engine.prompt_length(LABELS) == len(prompt)
    assert engine.token_starts("") == []
    assert engine.token_starts(f"a{END}b")[:3] == [0, 1, 2], "the end token's name is text"


@pytest.mark.parametrize("text", ["Lena met Jakob.", "😀 " * 60, "日本語" * 50, "a\t\t\tb\n\n\n\nc", "é́\u0301x\u3000y"])
def test_engine_token_starts_count_every_token(engine, text):
    """Characters of several tokens count as many times: a window of as many starts as fit must fit."""
    starts = engine.token_starts(text)
    assert starts == sorted(starts)
    assert all(0 <= start < len(text) for start in starts)
    n_body = len(engine.encoder.body(text)) - len(engine.encoder.body(""))
    assert abs(len(starts) - n_body) <= 2


# Settings


@needs_no_cuda
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:1", "cuda:99"])
def test_engine_no_such_cuda_device(bank, device):
    with pytest.raises(SamError) as caught:
        TorchEngine(bank, resolve_method, device=device)
    assert caught.value.code == "S501"
    assert f"'{device}'" in str(caught.value)


@pytest.mark.parametrize("device", ["tpu", "", "cpu:x", "meta", "xla", "CPU "])
def test_engine_unknown_device(bank, device):
    with pytest.raises(SamError) as caught:
        TorchEngine(bank, resolve_method, device=device)
    assert caught.value.code == "S501"


@needs_no_cuda
def test_engine_default_device_is_the_best_there_is():
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device(None).type == best
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("dtype", ["int8", "float", "fp32", "torch.float32", "auto", ""])
def test_engine_unknown_dtype(bank, dtype):
    with pytest.raises(SamError) as caught:
        TorchEngine(bank, resolve_method, device="cpu", dtype=dtype)
    assert caught.value.code == "S502"


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_engine_dtype(banks, dtype):
    engine = make_engine(banks["llama"], dtype=dtype)
    assert engine.model.dtype == getattr(torch, dtype or "float32")
    assert len(engine.generate(mixture()[:8])) == 8


@pytest.mark.parametrize("setting", ["max_new_tokens", "tokens_per_batch"])
@pytest.mark.parametrize("value", [0, -1, "128", 1.5, True])
def test_engine_bad_numbers_are_refused_before_loading(setting, value):
    with pytest.raises(SamError) as caught:
        make_torch_engine(**{setting: value})
    assert caught.value.code == "S205"
    assert caught.value.fields["setting"] == setting


def test_engine_maker_can_be_pickled(banks):
    maker = pickle.loads(pickle.dumps(make_torch_engine("cpu", max_new_tokens=5, tokens_per_batch=700)))
    engine: Any = maker(banks["llama"])
    assert (engine.device.type, engine.max_new_tokens, engine.tokens_per_batch) == ("cpu", 5, 700)


# Bases on disk


def change_weights(base: Path) -> None:
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, file, metadata={"format": "pt"})


def reshape_config(base: Path) -> None:
    """A base of no known kind."""
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "nothing known"}))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (change_weights, "S110"),
        (shutil.rmtree, "S503"),
        (lambda base: (base / "config.json").unlink(), "S503"),
        (lambda base: (base / "model.safetensors").unlink(), "S503"),
        (lambda base: (base / "tokenizer.json").unlink(), "S110"),
        (lambda base: (base / "tokenizer_config.json").write_text("{"), "S503"),
        (reshape_config, "S503"),
    ],
    ids=["changed", "gone", "no config", "no weights", "no tokenizer", "half a tokenizer", "unknown kind"],
)
def test_engine_base_changed_on_disk(bank_copy, damage, code):
    damage(Path(bank_copy.base[0]))
    with pytest.raises(SamError) as caught:
        make_engine(bank_copy)
    assert caught.value.code == code
