"""Parallel decoding of answers gives what decoding a token at a time gives."""

import pytest
import torch
from helpers import make_tiny_bank
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.generate import parallel, torch_engine
from spacy_sam.generate.engine import Request
from spacy_sam.generate.guesses import BAR, InlineGuess, Line, LinesGuess
from spacy_sam.generate.passes import Seq2SeqPasses
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
    begin = {"first": {at: label for at in ends}, "bars": {at: BAR for at in ends}}.get(marks or "", {})
    guess = InlineGuess(grammar, source, labels, 400, begin)
    prompt = grammar.encoder.prefix(LABELS) + grammar.encoder.body(text)
    engine.switch.restore()
    with torch.inference_mode():
        parallel.decode(engine.model, Seq2SeqPasses(engine.model, [prompt]), [guess])
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
        rows = args[2]
        turned = [
            [(choice + len(passes)) % len(d.allowed) for choice, d in zip(chosen, row.open)]
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


OTHERS = [
    ("llama", "Inline"),
    ("opt", "Inline"),
    ("llama", "Lines"),
    ("opt", "Lines"),
    ("gpt2", "Lines"),
    ("bart", "Lines"),
]


@pytest.fixture(scope="module", params=OTHERS, ids=lambda pair: "-".join(pair).lower())
def other(request, tmp_path_factory) -> TorchEngine:
    """Engines for every other kind of base and format; of a model whose answers have entities, and come to an end."""
    architecture, name = request.param
    path = tmp_path_factory.mktemp("other") / "bank"
    make_tiny_bank(path, architecture=architecture, prompt={"name": f"spacy_sam.{name}.v1"})
    return TorchEngine(ExpertBank(path), resolve_method, device="cpu", tokens_per_batch=600)


def assert_same(fast, slow):
    for one, expected in zip(fast, slow):
        assert (one.text, one.ends, one.finished) == (expected.text, expected.ends, expected.finished)
        assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@settings(max_examples=25)
@given(
    found=st.lists(texts, min_size=1, max_size=5),
    expert=st.sampled_from([(), ("expert0",), ("expert0", "expert1")]),
    bias=st.sampled_from([-1.0, 0.0, 2.0]),
)
def test_every_base_and_format_is_step_by_step(other, found, expert, bias):
    assert other.parallel
    other.entity_bias = bias
    requests = [Request(TaskModelSpec(expert), LABELS[: 1 + len(text) % 4], text) for text in found]
    assert_same(other.generate(requests), step_by_step(other, requests))


def test_every_base_and_format_finds_entities(other):
    """Or the test above would prove nothing."""
    other.entity_bias = 1.0
    words = ["abc", "def", "ghi", "jkl"]
    requests = [Request(TaskModelSpec((e,)), LABELS, f"{w} some ({w})") for w in words for e in ("expert0", "expert1")]
    answers = other.generate(requests)
    mentions = [other.encoder.format.parse(answer.text, LABELS) for answer in answers]
    assert sum(len(parsed.mentions) for parsed in mentions) > 3
    assert not any(parsed.n_malformed for parsed, answer in zip(mentions, answers) if answer.finished)


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_out_of_memory_at_any_pass(other, monkeypatch, fail_at):
    """While the prompts are encoded, and later: half as many rows are tried, and nothing is lost."""
    requests = [Request(TaskModelSpec(), LABELS, f"some text ({word}) here") for word in ("abc", "def", "ghi", "jkl")]
    other.entity_bias = 1.0
    other._guesses.clear()
    expected = other.generate(requests)
    decoder, calls = other.model.get_decoder(), []
    forward = decoder.forward

    def limited(*args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) - 1 == fail_at:
            raise torch.OutOfMemoryError("no memory left, says the test")
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", limited)
    monkeypatch.setattr(other, "tokens_per_batch", 10_000)
    other._guesses.clear()
    assert_same(other.generate(requests), expected)
    assert calls[fail_at + 1] == len(requests) // 2


def test_a_text_is_tokenised_once_a_call(other, monkeypatch):
    """However many texts and task models there are; what is kept from call to call is bounded."""
    monkeypatch.setattr(torch_engine, "MAX_ROWS", 2)
    monkeypatch.setattr(torch_engine, "MAX_GUESSES", 2)
    body, asked = other.encoder.body, []
    monkeypatch.setattr(other.encoder, "body", lambda text: asked.append(text) or body(text))
    found = [f"some text {number}" for number in range(4)]
    other.generate([])
    other.generate([Request(TaskModelSpec(experts), LABELS, text) for experts in [(), ("expert0",)] for text in found])
    assert sorted(asked) == found
    assert len(other._guesses) == len(found)
    other.generate([])
    assert not other._rows
    assert not other._guesses


LINES_TEXT = "A | place, or the | of | a person"


@pytest.fixture(scope="module")
def lines_engine(tmp_path_factory) -> TorchEngine:
    path = tmp_path_factory.mktemp("lines") / "bank"
    make_tiny_bank(path, prompt={"name": "spacy_sam.Lines.v1"})
    return TorchEngine(ExpertBank(path), resolve_method, device="cpu", entity_bias=1.0)


@example(text="place, | the | |", spans=[(4, 2, "place name"), (3, 3, "person"), (6, 3, "place name")])
@settings(max_examples=60)
@given(
    text=st.lists(st.sampled_from(LINES_TEXT.split()), min_size=1, max_size=7).map(" ".join),
    spans=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.sampled_from(LABELS)), max_size=4),
)
def test_any_lines_lead_to_the_same_answer(lines_engine, text, spans):
    """Those of other texts too: what the grammar does not allow is left out."""
    engine, words = lines_engine, LINES_TEXT.split()
    plain = engine.grammar.encoder.plain
    known = [
        Line(tuple(plain(" " + " ".join(words[at : at + n]))), tuple(plain(f" | {label}\n"))) for at, n, label in spans
    ]
    request = Request(TaskModelSpec(), LABELS, text)
    engine._guesses.clear()
    (nothing_known,) = engine.generate([request])
    engine._guesses[LABELS, text] = known
    assert_same(engine.generate([request]), [nothing_known])
    assert_same([nothing_known], step_by_step(engine, [request]))


def test_a_right_answer_takes_one_pass(lines_engine, monkeypatch):
    passes = []
    decide = parallel._decide
    monkeypatch.setattr(parallel, "_decide", lambda *args: passes.append(1) or decide(*args))
    requests = [Request(TaskModelSpec(), LABELS, LINES_TEXT)]
    first = lines_engine.generate(requests)
    passes.clear()
    assert_same(lines_engine.generate(requests), first)
    assert len(passes) == 1


def test_lines_of_a_guess_are_kept(lines_engine):
    grammar = lines_engine.grammar
    guess = LinesGuess(grammar, grammar.paths("a b"), grammar.trie(LABELS), 99, [Line((0,), (0,))])
    guess.write()
    assert guess.content == []
    assert guess.tokens == [grammar.end_id]


def test_models_that_forget_are_left_to_steps(tmp_path):
    """A sliding window's keys cannot be cut back."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert not parallel.can_decode(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8)).eval())
    assert parallel.can_decode(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None)).eval())
