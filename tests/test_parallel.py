"""Parallel decoding of inline answers gives what decoding a token at a time gives."""

import pytest
import torch
from helpers import make_tiny_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate import parallel
from spacy_sam.generate.engine import Request
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.plan import TaskModelSpec
from spacy_sam.registered import make_torch_engine, resolve_method

LABELS = ("person", "place", "place name", "person or place")
words = st.text(alphabet="abA9é-.(東", min_size=1, max_size=6)
texts = st.lists(words, max_size=7).map(" ".join)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> ExpertBank:
    path = tmp_path_factory.mktemp("inline") / "bank"
    make_tiny_bank(path, architecture="bart", prompt={"name": "spacy_sam.Inline.v1"})
    return ExpertBank(path)


@pytest.fixture(scope="module")
def engine(bank) -> TorchEngine:
    engine = TorchEngine(bank, resolve_method, device="cpu")
    with torch.no_grad():  # a random model hardly ever marks: let the marks and the text have like chances
        engine.model.final_logits_bias.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return engine


def step_by_step(engine: TorchEngine, requests):
    engine.parallel = False
    try:
        return engine.generate(requests)
    finally:
        engine.parallel = True


def test_the_engine_decodes_in_parallel(engine):
    assert engine.parallel
    assert parallel.can_decode(engine.model)


@settings(max_examples=40)
@given(
    found=st.lists(texts, min_size=1, max_size=5), expert=st.sampled_from([(), ("expert0",), ("expert0", "expert1")])
)
def test_parallel_is_step_by_step(engine, found, expert):
    requests = [Request(TaskModelSpec(expert), LABELS[: 1 + len(text) % 4], text) for text in found]
    fast, slow = engine.generate(requests), step_by_step(engine, requests)
    for one, other in zip(fast, slow):
        assert one.text == other.text
        assert one.ends == other.ends
        assert one.finished == other.finished
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_answers_have_marks(engine):
    """Or the test above would prove nothing."""
    requests = [
        Request(TaskModelSpec(), LABELS, f"some {word} text ({word}) here") for word in ["abc", "def", "ghi", "jkl"]
    ]
    answers = [completion.text for completion in engine.generate(requests)]
    n_words, n_labels, n_bars = (sum(answer.count(sign) for answer in answers) for sign in (" ", "⟨", "¦"))
    assert n_labels
    assert n_bars
    assert n_labels + n_bars < n_words


@pytest.mark.parametrize("marks", [{}, "first", "bars"])
def test_any_first_guess_leads_to_the_same_answer(engine, marks):
    grammar, text = engine.grammar, "Some text, with (nine) words in it."
    source, labels = grammar.source(text), grammar.trie(LABELS)
    ends = [at for at, ends in enumerate(source.ends_word) if ends]
    label = (*grammar.encoder.plain(" person or place"), *grammar.closing)
    begin = {"first": {at: label for at in ends}, "bars": {at: parallel.BAR for at in ends}}.get(marks or "", {})
    guess = parallel.Guess(grammar, source, labels, 400, begin)
    prompt = grammar.encoder.prefix(LABELS) + grammar.encoder.body(text)
    engine.switch.restore()
    with torch.inference_mode():
        parallel.decode(engine.model, [prompt], [guess])
    (expected,) = step_by_step(engine, [Request(TaskModelSpec(), LABELS, text)])
    assert grammar.encoder.decode(guess.tokens[:-1])[0] == expected.text


def test_one_task_model_s_answers_are_first_guesses_of_the_next(engine, bank, monkeypatch):
    """With the same result as without, in fewer passes over the texts than from nothing."""
    requests = [Request(TaskModelSpec(), LABELS, f"some {word} text ({word}) here") for word in ["abc", "def", "ghi"]]
    passes = []
    decide = parallel._decide
    monkeypatch.setattr(parallel, "_decide", lambda *args: passes.append(1) or decide(*args))
    engine._guesses.clear()
    first = engine.generate(requests)
    n_first = len(passes)
    assert [a.text for a in engine.generate(requests)] == [a.text for a in first]
    assert len(passes) - n_first == 1 < n_first
    others = [request._replace(task_model=TaskModelSpec(("expert0",))) for request in requests]
    found = engine.generate(others)
    engine._guesses.clear()
    assert [a.text for a in engine.generate(others)] == [a.text for a in found]


def test_choices_that_take_turns_come_to_an_end(engine, monkeypatch):
    """Rounding that changes from pass to pass, at its worst: every choice is another one in every second pass."""
    decide, passes = parallel._decide, []

    def flickering(*args):
        passes.append(1)
        assert len(passes) < 200
        answers = decide(*args)
        rows = args[3]
        turned = [
            [(choice + len(passes)) % len(d.allowed) for choice, d in zip(chosen, row.decisions)]
            for row, (chosen, _) in zip(rows, answers)
        ]
        return [(chosen, scores) for chosen, (_, scores) in zip(turned, answers)]

    monkeypatch.setattr(parallel, "_decide", flickering)
    engine._guesses.clear()
    (answer,) = engine.generate([Request(TaskModelSpec(), LABELS, "some text (abc) here, and more")])
    assert answer.finished
    assert len(passes) > 5
    engine._guesses.clear()


def test_answers_are_cut_at_the_limit(engine, monkeypatch):
    requests = [Request(TaskModelSpec(), LABELS, "9 9 9 9 9 9 (abc) def 9 9")]
    (whole,) = engine.generate(requests)
    monkeypatch.setattr(engine, "max_new_tokens", len(whole.logprobs) - 5)
    fast, slow = engine.generate(requests), step_by_step(engine, requests)
    assert fast[0].text == slow[0].text
    assert whole.text.startswith(fast[0].text)
    assert (len(fast[0].logprobs), fast[0].finished) == (len(whole.logprobs) - 5, False)


def test_models_with_other_heads_are_left_to_steps(engine):
    with torch.no_grad():
        model = engine.model
        head = model.lm_head
        model.lm_head = torch.nn.Sequential(head)
        model.lm_head.weight = torch.nn.Parameter(head.weight * 2)
        try:
            assert not parallel.can_decode(model)
        finally:
            model.lm_head = head


BIASED = [Request(TaskModelSpec(), LABELS, text) for text in ("abc def (ghi), jkl", "some text", "9 9 b A-a")]


@pytest.mark.parametrize("bias", [-1.0, 0.02, 0.1, 5.0])
def test_parallel_is_step_by_step_with_a_bias(engine, monkeypatch, bias):
    monkeypatch.setattr(engine, "entity_bias", bias)
    fast, slow = engine.generate(BIASED), step_by_step(engine, BIASED)
    assert [one.text for one in fast] == [other.text for other in slow]
    assert [one.logprobs for one in fast] == [pytest.approx(other.logprobs, abs=1e-4) for other in slow]


def test_entity_bias_decides_how_many_entities_begin(engine, monkeypatch):
    monkeypatch.setattr(engine, "_limit", lambda n_body, n_prefix: 400)  # room for a mark behind every word
    n_found = []
    for bias in (-50.0, 0.0, 50.0):
        monkeypatch.setattr(engine, "entity_bias", bias)
        n_found.append(sum(completion.text.count("⟨") for completion in engine.generate(BIASED)))
    n_words = sum(sum(engine.grammar.source(request.text).ends_word) for request in BIASED)
    assert n_found[0] == 0 < n_found[1] < n_found[2] == n_words


def test_entity_bias_is_not_in_the_scores(engine, monkeypatch):
    """A mark that is forced by the bias has the probability that the model gave it."""
    request = BIASED[1]
    (plain,) = engine.generate([request])
    monkeypatch.setattr(engine, "entity_bias", 50.0)
    (biased,) = engine.generate([request])
    first = next(at for at, (one, other) in enumerate(zip(plain.logprobs, biased.logprobs)) if one != other)
    kept, marked = plain.logprobs[first], biased.logprobs[first]
    assert torch.tensor([kept, marked]).exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_the_bank_has_a_bias_and_the_engine_another(bank):
    assert bank.entity_bias == 0.0
    bank.entity_bias = 0.5
    assert ExpertBank(bank.path).entity_bias == 0.5
    assert TorchEngine(bank, resolve_method, device="cpu").entity_bias == 0.5
    assert TorchEngine(bank, resolve_method, device="cpu", entity_bias=0.0).entity_bias == 0.0
    bank.entity_bias = 0.0


@pytest.mark.parametrize("bias", ["1", True, float("nan"), float("inf")])
def test_a_bias_is_a_finite_number(bias):
    with pytest.raises(SamError, match=r"S205.*'entity_bias'.*finite number"):
        make_torch_engine(entity_bias=bias)
