"""The grammar of answers in lines: whatever is chosen of what it allows can be read, and every surface is in the text."""

import random
from typing import List

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_constrain import finish

from spacy_sam.align import Scored, align
from spacy_sam.generate.lines import MAX_WORDS, LinesGrammar
from spacy_sam.prompts import LinesFormat, PromptEncoder, begins_word, ends_word, flatten_text
from spacy_sam.train.vocab import build_tokenizer

LABELS = ("city", "city or town", "gene", "東", "a | gene", "|")
FORMAT = LinesFormat()
texts = st.text(alphabet=st.sampled_from(list("abc9 |.\n\u2028(é東\U0001f600-_")), min_size=0, max_size=30)


@pytest.fixture(scope="module", params=[True, False], ids=["words", "bytes"])
def grammar(request) -> LinesGrammar:
    """With tokens of whole words, separators among them, and of single bytes."""
    texts = ["a city in the town |", "abc 9 genes | gene\n", "aé (abc-9)"] * 3
    tokenizer = build_tokenizer(texts, 320 if request.param else 260, 512)
    return LinesGrammar(PromptEncoder(tokenizer, FORMAT))


def is_in(surface: str, shown: str) -> bool:
    """Whether a surface occurs as a run of whole words."""
    places = [at for at in range(len(shown)) if shown.startswith(surface, at)]
    return any(begins_word(shown, at) and ends_word(shown, at + len(surface)) for at in places)


@given(text=texts, seed=st.integers(0, 1000))
def test_any_choice_can_be_read_and_is_in_the_text(grammar, text, seed):
    tokens = finish(grammar.walk(LABELS, text), grammar.end_id, random.Random(seed))
    parsed = FORMAT.parse(grammar.encoder.decode(tokens[:-1])[0], LABELS)
    assert parsed.n_malformed == 0
    shown = flatten_text(text)
    for mention in parsed.mentions:
        assert mention.label in LABELS
        assert is_in(mention.surface, shown)
    found, n_dropped = align([Scored(m.label, m.surface, 1.0) for m in parsed.mentions], text, 0)
    assert n_dropped == 0
    assert all(text[span.start : span.end].strip() for span in found)


@given(text=texts, seed=st.integers(0, 1000))
def test_surfaces_begin_one_after_the_other(grammar, text, seed):
    walk = grammar.walk(LABELS, text)
    choose = random.Random(seed)
    least: List[int] = []
    for _ in range(2000):
        if walk.at_start:
            least.append(walk.least)
        token = choose.choice(walk.allowed())
        if token == grammar.end_id:
            break
        walk.advance(token)
    assert least == sorted(set(least))


def test_known_answer_is_the_formats(grammar):
    text, spans = "The Tate is (IL-2) in London, London.", [(4, 8, "city"), (13, 17, "gene"), (22, 28, "city or town")]
    answer = grammar.answer(LABELS, text, spans)
    assert grammar.encoder.decode(answer[:-1])[0] == FORMAT.answer(text, spans)
    assert answer == grammar.encoder.answer(text, spans)


@pytest.mark.parametrize("spans", [[(1, 3, "city")], [(0, 2, "city")], [(3, 8, "city")], [(0, 3, "town")]])
def test_answers_that_the_grammar_lacks(grammar, spans):
    """Half a word, a space at the beginning, a label that is not asked."""
    assert grammar.answer(LABELS, "abc 9aaa bc", spans) is None


def test_a_surface_may_hold_the_separator(grammar):
    text = "abc | gene and |"
    for span in [(0, 5, "gene"), (0, 10, "city"), (0, 3, "a | gene"), (4, 5, "|"), (4, 10, "|"), (0, 16, "|")]:
        answer = grammar.answer(LABELS, text, [span])
        assert answer is not None, span
        parsed = FORMAT.parse(grammar.encoder.decode(answer[:-1])[0], LABELS)
        assert parsed.n_malformed == 0


def test_a_repeated_surface_is_the_first_that_is_left(grammar):
    walk = grammar.walk(LABELS, "abc 9 abc")
    line = [*grammar.encoder.plain(" abc"), *grammar.encoder.plain(" | city\n")]
    assert walk.follow(line) is not None
    assert walk.least == 1
    assert walk.follow(line) is not None
    assert walk.allowed() == (grammar.end_id,)


def test_surfaces_have_an_end(grammar):
    text = " ".join("abc" for _ in range(MAX_WORDS + 5))
    assert grammar.answer(LABELS, text, [(0, 4 * MAX_WORDS - 1, "city")]) is not None
    assert grammar.answer(LABELS, text, [(0, 4 * MAX_WORDS + 3, "city")]) is None


def test_no_words_no_surfaces(grammar):
    assert grammar.walk(LABELS, " \n ").allowed() == (grammar.end_id,)
