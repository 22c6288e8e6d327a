"""The answer grammars as Lark text: llguidance allows the very tokens that the grammars' own walks allow."""

import random
from typing import Any, List, Sequence

import llguidance.hf
import llguidance.numpy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, grammar_from

from spacy_sam.errors import SamError
from spacy_sam.generate.constrain import InlineGrammar
from spacy_sam.generate.grammars import AnswerGrammar, make_grammar
from spacy_sam.generate.lark import bias_logits, write_grammar
from spacy_sam.generate.lines import LinesGrammar
from spacy_sam.prompts import InlineFormat, LinesFormat, PromptEncoder
from spacy_sam.train.vocab import build_tokenizer

LABELS = ("city", "city or town", "gene", "東", "a | gene", "|")
SOURCES = ["a city in the town |", "abc 9 genes | gene\n", "aé (abc-9)", "⟨ city⟩ abc¦ 9⟨ gene⟩"] * 3
texts = st.text(alphabet=st.sampled_from(list("abc9 ⟨¦⟩|.\n\u2028(é東\U0001f600-_–")), max_size=30)


class Case:
    """A grammar, and llguidance with the same tokenizer."""

    def __init__(self, prompt_format: Any, vocab_size: int) -> None:
        tokenizer = build_tokenizer(SOURCES, vocab_size, 512)
        self.grammar: AnswerGrammar = make_grammar(PromptEncoder(tokenizer, prompt_format))
        self.tokenizer: LLTokenizer = llguidance.hf.from_tokenizer(tokenizer)

    def matcher(self, labels: Sequence[str], text: str) -> LLMatcher:
        lark = write_grammar(self.grammar, labels, text)
        matcher = LLMatcher(self.tokenizer, grammar_from("grammar", lark))
        assert matcher.get_error() == ""
        return matcher

    def allowed(self, matcher: LLMatcher) -> List[int]:
        mask = llguidance.numpy.allocate_token_bitmask(1, self.tokenizer.vocab_size)
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        assert matcher.get_error() == ""
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()

    def compare(self, labels: Sequence[str], text: str, choose: random.Random) -> None:
        """Go one way through the grammar, and look at every step."""
        walk, matcher = self.grammar.walk(labels, text), self.matcher(labels, text)
        for _ in range(1000):
            allowed = walk.allowed()
            assert self.allowed(matcher) == sorted(allowed)
            token = choose.choice(allowed)
            if token == self.grammar.end_id:
                return
            walk.advance(token)
            assert matcher.consume_token(token)


@pytest.fixture(scope="module", params=[320, 258], ids=["words", "bytes"])
def vocab_size(request) -> int:
    """With tokens of whole words, marks among them, and of single bytes, so that marks and labels begin alike."""
    return request.param


@pytest.fixture(scope="module")
def inline(vocab_size) -> Case:
    return Case(InlineFormat(), vocab_size)


@pytest.fixture(scope="module")
def lines(vocab_size) -> Case:
    return Case(LinesFormat(), vocab_size)


@given(text=texts, seed=st.integers(0, 1000), labels=st.lists(st.sampled_from(LABELS), min_size=1, unique=True))
def test_inline_allows_what_the_walk_allows(inline, text, seed, labels):
    inline.compare(labels, text, random.Random(seed))


@given(text=texts, seed=st.integers(0, 1000), labels=st.lists(st.sampled_from(LABELS), min_size=1, unique=True))
def test_lines_allow_what_the_walk_allows(lines, text, seed, labels):
    lines.compare(labels, text, random.Random(seed))


@pytest.mark.parametrize(
    "text", ["", " ", "abc", "abc  ", "東", "\U0001f600", "abc abc abc abc", "a | gene\n a | gene"]
)
def test_texts_at_the_edge(inline, lines, text):
    for seed in range(10):
        inline.compare(LABELS, text, random.Random(seed))
        lines.compare(LABELS, text, random.Random(seed))


def test_long_texts_have_short_grammars(inline, lines):
    """One that grows with the square of the text would take longer to read than the answer takes to write."""
    text = " ".join(f"word{n} in" for n in range(100))
    for case in (inline, lines):
        half, whole = (len(write_grammar(case.grammar, LABELS, text[:n])) for n in (len(text) // 2, len(text)))
        assert whole < 3 * half
        assert case.allowed(case.matcher(LABELS, text))


def test_a_known_answer_is_in_the_grammar(inline, lines):
    text, entities = "abc in a city (9)", [(0, 3, "gene"), (7, 13, "city or town"), (15, 16, "|")]
    for case in (inline, lines):
        answer = case.grammar.answer(LABELS, text, entities)
        assert answer is not None
        matcher = case.matcher(LABELS, text)
        assert matcher.consume_tokens(answer[:-1])
        assert case.grammar.end_id in case.allowed(matcher)


# The bias


def test_bias_is_for_the_tokens_that_begin_an_entity(inline, lines):
    assert isinstance(inline.grammar, InlineGrammar)
    assert isinstance(lines.grammar, LinesGrammar)
    assert bias_logits(inline.grammar, ["gene", "city"], 1.5) == {inline.grammar.opening[0]: 1.5}
    assert bias_logits(lines.grammar, LABELS, 1.5) == {lines.grammar.end_id: -1.5}
    assert bias_logits(inline.grammar, LABELS, 0.0) == bias_logits(lines.grammar, LABELS, 0.0) == {}


def test_bias_that_would_decide_a_label_is_refused(inline, vocab_size):
    """The mark that closes the shorter label begins with the byte that opens a mark."""
    if vocab_size == 320:
        assert len(inline.grammar.opening) == 1
        assert bias_logits(inline.grammar, LABELS, 1.0)
        return
    with pytest.raises(SamError) as caught:
        bias_logits(inline.grammar, LABELS, 1.0)
    assert caught.value.code == "S205"
    assert caught.value.fields["setting"] == "entity_bias"
