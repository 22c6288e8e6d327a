"""The grammar of the inline format: whatever is chosen of what it allows can be read, and every span is in the text."""

import itertools
import random
from typing import List, Sequence, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spacy_sam.generate.constrain import InlineGrammar, Walk
from spacy_sam.generate.grammars import make_grammar
from spacy_sam.generate.lines import LinesGrammar
from spacy_sam.prompts import InlineFormat, LinesFormat, PromptEncoder
from spacy_sam.train.vocab import build_tokenizer

LABELS = ("city", "city or town", "gene", "東")
FORMAT = InlineFormat()
texts = st.text(alphabet=st.sampled_from(list("abc9 ⟨¦⟩|.\n\u2028(é東\U0001f600-_")), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def grammar() -> InlineGrammar:
    tokenizer = build_tokenizer(["a city in the town", "abc 9 genes", "aé (abc-9)"] * 3, 320, 512)
    return InlineGrammar(PromptEncoder(tokenizer, FORMAT))


def finish(walk: Walk, end_id: int, choose: random.Random) -> List[int]:
    tokens: List[int] = []
    while not tokens or tokens[-1] != end_id:
        allowed = walk.allowed()
        assert allowed
        tokens.append(choose.choice(allowed))
        walk.advance(tokens[-1])
        assert len(tokens) < 2000
    return tokens


def read(grammar: InlineGrammar, tokens: Sequence[int]) -> Tuple[List[Tuple[int, int, str]], int]:
    parsed = FORMAT.parse(grammar.encoder.decode(tokens[:-1])[0], LABELS)
    return [(m.at or 0, (m.at or 0) + len(m.surface), m.label) for m in parsed.mentions], parsed.n_malformed


@given(text=texts, seed=st.integers(0, 1000))
def test_any_choice_can_be_read_and_is_in_the_text(grammar, text, seed):
    tokens = finish(grammar.walk(LABELS, text), grammar.end_id, random.Random(seed))
    spans, n_malformed = read(grammar, tokens)
    shown = FORMAT.shown(text)
    assert n_malformed == 0
    assert spans == sorted(spans)
    for (_, end, _), (start, _, _) in itertools.pairwise(spans):
        assert end <= start
    for start, end, label in spans:
        surface = shown[start:end]
        assert label in LABELS
        assert surface
        assert surface == surface.strip()
        assert start == 0 or not (shown[start - 1].isalnum() and surface[0].isalnum())
        assert end == len(shown) or not (shown[end].isalnum() and surface[-1].isalnum())


@given(text=texts, seed=st.integers(0, 1000))
def test_answer_of_what_was_read_is_the_same_walk(grammar, text, seed):
    tokens = finish(grammar.walk(LABELS, text), grammar.end_id, random.Random(seed))
    spans, _ = read(grammar, tokens)
    assert grammar.answer(LABELS, text, spans) == tokens


@given(text=texts)
def test_a_text_without_entities_is_its_own_answer(grammar, text):
    answer = grammar.answer(LABELS, text, [])
    assert grammar.encoder.decode(answer[:-1])[0] == FORMAT.answer(text, [])


def test_known_answer_is_the_formats():
    text, spans = "The Tate is (IL-2) in London.", [(4, 8, "city"), (13, 17, "gene"), (22, 28, "city or town")]
    grammar = InlineGrammar(PromptEncoder(build_tokenizer([text], 300, 128), FORMAT))
    assert grammar.encoder.decode(grammar.answer(LABELS, text, spans)[:-1])[0] == FORMAT.answer(text, spans)


@pytest.mark.parametrize(
    "spans",
    [
        [(1, 3, "city")],  # begins inside a word
        [(0, 2, "city")],  # ends inside one
        [(0, 8, "city"), (4, 8, "gene")],  # overlap
        [(3, 8, "city")],  # a space at its beginning
        [(0, 4, "city")],  # and one at its end
    ],
)
def test_answers_that_the_grammar_lacks(grammar, spans):
    assert grammar.answer(LABELS, "abc 9aaa bc", spans) is None


def test_labels_that_begin_alike_are_told_apart(grammar):
    text = "abc"
    for label in LABELS:
        answer = grammar.answer(LABELS, text, [(0, 3, label)])
        walk = grammar.walk(LABELS, text)
        for token in answer:
            assert token in walk.allowed()
            walk.advance(token)
        assert read(grammar, answer) == ([(0, 3, label)], 0)


def test_every_format_has_its_grammar(grammar):
    tokenizer: PreTrainedTokenizerFast = grammar.encoder.tokenizer
    assert isinstance(make_grammar(PromptEncoder(tokenizer, LinesFormat())), LinesGrammar)
    assert isinstance(make_grammar(PromptEncoder(tokenizer, FORMAT)), InlineGrammar)
