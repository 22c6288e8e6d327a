import itertools
import re

import numpy
import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc

from spacy_sam.errors import SamError
from spacy_sam.windows import Window, doc_windows

NLP = spacy.blank("en")
ALPHABET = 'ab.!? \n\t\u3000é\u0301中。」"👩\u200d\U0001f469ßİ_'
texts = st.one_of(st.text(ALPHABET, max_size=80), st.text(max_size=40), st.text("ab", max_size=80))
long_run = settings(deadline=None, max_examples=300)


def words(text):
    return [match.start() for match in re.finditer(r"\S+", text)]


def chars(text):
    return range(len(text))


def cut(doc, size, overlap=0, token_starts=words):
    doc = NLP.make_doc(doc) if isinstance(doc, str) else doc
    windows = doc_windows(doc, token_starts=token_starts, size=size, overlap=overlap)
    for window in windows:
        assert doc.text[window.start : window.start + len(window.text)] == window.text
    return [window.text for window in windows]


def sentences(*lengths):
    """A document of sentences w0 w1 ... with these numbers of words."""
    names = [f"w{i}" for i in range(sum(lengths))]
    starts = [i == 0 for length in lengths for i in range(length)]
    return Doc(NLP.vocab, words=names, sent_starts=starts)


def touched(starts, start, end):
    """Model tokens that [start, end) touches, by looking at each."""
    inside = [s for s in starts if start <= s < end]
    return len(inside) + (start not in starts and any(s < start for s in starts))


@st.composite
def docs(draw):
    """Documents of spaCy's tokenizer, and of any tokens, with and without sentence boundaries."""
    if draw(st.booleans()):
        doc = NLP.make_doc(draw(texts))
    else:
        pieces = draw(st.lists(st.text(ALPHABET, min_size=1, max_size=12), max_size=12))
        doc = Doc(NLP.vocab, words=pieces, spaces=[draw(st.booleans()) for _ in pieces])
    if draw(st.booleans()):
        for token in doc[1:]:
            token.is_sent_start = draw(st.sampled_from([True, False, None]))
    return doc


@st.composite
def cases(draw, unique=False):
    """A document, model tokens that start anywhere in it, a size and an overlap."""
    doc = draw(docs())
    length = len(doc.text)
    if draw(st.booleans()) or not length:
        starts = list(range(length))
    else:
        starts = sorted(draw(st.lists(st.integers(0, length - 1), max_size=3 * length, unique=unique)))
    size = draw(st.integers(1, 12))
    return doc, starts, size, draw(st.integers(0, size - 1))


def test_windows_one_window_when_it_fits():
    doc = NLP.make_doc("  Ann met\nBob. ")
    assert doc_windows(doc, token_starts=words, size=3, overlap=1) == [Window("Ann met\nBob.", 2)]


@pytest.mark.parametrize("text", ["", " ", "\n\n\t\u3000"])
def test_windows_nothing_in_white_space(text):
    assert cut(text, 3) == []


def test_windows_pack_sentences_without_overlap():
    assert cut(sentences(3, 2, 4, 1, 2), 5, 2) == ["w0 w1 w2 w3 w4", "w5 w6 w7 w8 w9", "w10 w11"]


def test_windows_pack_only_whole_sentences():
    assert cut(sentences(3, 3, 1), 5, 2) == ["w0 w1 w2", "w3 w4 w5 w6"]


def test_windows_long_sentence_is_cut_with_overlap_and_its_rest_is_packed():
    assert cut(sentences(1, 6, 2, 2), 4, 1) == ["w0", "w1 w2 w3 w4", "w4 w5 w6", "w7 w8 w9 w10"]
    assert cut(sentences(1, 6, 1, 2), 4, 1) == ["w0", "w1 w2 w3 w4", "w4 w5 w6 w7", "w8 w9"]


def test_windows_white_space_between_sentences_is_free():
    doc = Doc(NLP.vocab, words=["Ann", "\n\n\n\n", "Bob"], spaces=[False] * 3, sent_starts=[True, False, True])
    assert cut(doc, 3, token_starts=chars) == ["Ann", "Bob"]
    doc = Doc(NLP.vocab, words=["A", "nn\n\n", "B"], spaces=[True, False, False], sent_starts=[True, False, True])
    assert cut(doc, 4, token_starts=chars) == ["A nn", "B"]


def test_windows_without_sentences_overlap():
    assert cut("a b c d e f g h i j", 4, 1) == ["a b c d", "d e f g", "g h i j"]
    assert cut("a b c d e f g h i j", 4, 0) == ["a b c d", "e f g h", "i j"]
    assert cut("a b c d e f", 4, 3) == ["a b c d", "b c d e", "c d e f"]


def test_windows_end_at_punctuation_in_the_last_third():
    # Tokens are words here; a full stop in the last third ends the window and needs no overlap.
    assert cut("a b c d came. e f g h i j", 6, 2) == ["a b c d came.", "e f g h i j"]
    assert cut('a b c "d came." e f g h i j', 6, 2) == ['a b c "d came."', "e f g h i j"]
    # One that is earlier does not.
    assert cut("a b c came. e f g h i j", 6, 2) == ["a b c came. e f", "e f g h i j"]
    assert cut("a b came. d e f g h i j", 6, 2) == ["a b came. d e f", "e f g h i j"]


def test_windows_abbreviations_do_not_end_a_window():
    assert cut("a b c d Dr. e f g h", 6, 2) == ["a b c d Dr. e", "Dr. e f g h"]
    glued = Doc(NLP.vocab, words=["a", "b", "c", ".", "d", "e"], spaces=[True, True, False, False, True, False])
    assert cut(glued, 6, 2, chars) == ["a b c.", "c.d e"]
    assert cut("a b c d v1.2 e f g h", 6, 2) == ["a b c d v1.2 e", "v1.2 e f g h"]


def test_windows_end_at_cjk_full_stop():
    doc = Doc(NLP.vocab, words=list("私は東京へ行く。「はい」と"), spaces=[False] * 13)
    assert cut(doc, 9, 3, chars) == ["私は東京へ行く。", "「はい」と"]


def test_windows_blank_line_needs_no_overlap_and_line_break_does():
    assert cut("a b c d e\n\nf g h i", 6, 2) == ["a b c d e", "f g h i"]
    assert cut("a b c d e\nf g h i", 6, 2) == ["a b c d e", "d e\nf g h i"]
    # A sure end goes before a later line break.
    assert cut("a b c d e f came.\ng\nh i j k", 9, 2) == ["a b c d e f came.", "g\nh i j k"]


def test_windows_large_overlap_moves_on_after_a_line_break():
    assert cut("a b c d e\nf g h i", 6, 5) == ["a b c d e", "b c d e\nf g", "c d e\nf g h", "d e\nf g h i"]


def test_windows_long_token_is_cut_by_characters():
    assert cut("ab " + "x" * 10 + " cd", 4, 1, chars) == ["ab", "xxxx", "xxxx", "xxxx", "cd"]
    assert cut("abcdefghij", 4, 1, chars) == ["abcd", "defg", "ghij"]
    assert cut("abcdefghij", 4, 0, chars) == ["abcd", "efgh", "ij"]


def test_windows_overlap_gives_way_to_a_token_that_would_not_fit():
    # With an overlap of 3, "efghi" would be cut in two.
    assert cut("a b c efghi", 6, 3, chars) == ["a b c", "efghi"]
    assert cut("a b c efgh", 6, 3, chars) == ["a b c", "c efgh"]


def test_windows_token_begun_before_a_window_counts():
    # Model tokens of two characters; a window that starts inside one touches it.
    doc = Doc(NLP.vocab, words=["abc", "defgh"], spaces=[False, False], sent_starts=[True, True])
    starts = [0, 2, 4, 6]
    assert cut(doc, 2, 0, lambda text: starts) == ["abc", "def", "gh"]


def test_windows_one_character_of_many_tokens_is_kept():
    assert cut("👩 👩", 2, 1, lambda text: [0, 0, 0, 0, 2, 2, 2, 2]) == ["👩", "👩"]
    # No overlap where it would leave no room for the next character.
    whole = Doc(NLP.vocab, words=["ab👩c"])
    assert cut(whole, 3, 2, lambda text: [0, 1, 2, 2, 2, 3]) == ["ab", "👩", "c"]


@pytest.mark.parametrize("starts", [[], [0], [5], numpy.asarray([0, 3, 3])])
def test_windows_few_model_tokens(starts):
    text = "Ann met Bob"
    (whole,) = cut(text, 3, 2, lambda _: starts)
    assert whole == text


def test_windows_asks_for_tokens_once():
    calls = []

    def token_starts(text):
        calls.append(text)
        return words(text)

    doc = NLP.make_doc("a b c d e f g")
    cut(doc, 2, 1, token_starts)
    assert calls == [doc.text]


def test_windows_do_not_change_the_doc():
    doc = sentences(3, 2)
    before = doc.to_bytes()
    cut(doc, 2, 1)
    assert doc.to_bytes() == before


@pytest.mark.parametrize(
    ("size", "overlap", "setting"), [(0, 0, "size"), (-1, 0, "size"), (3, 3, "overlap"), (3, -1, "overlap")]
)
def test_windows_refuse_impossible_settings(size, overlap, setting):
    with pytest.raises(SamError, match=rf"\[S205\] '{setting}'"):
        cut("", size, overlap)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("n_words", [1, 100_000])
def test_windows_linear_in_long_documents(n_words):
    n_chars = 1_000_000
    doc = Doc(NLP.vocab, words=["x" * (n_chars // n_words - 2), "."] * n_words)
    windows = doc_windows(doc, token_starts=chars, size=200, overlap=100)
    assert len(windows) > n_chars / 200
    assert windows[-1].start + len(windows[-1].text) == len(doc.text.rstrip())


@long_run
@given(cases())
def test_windows_hold_all_and_fit(case):
    doc, starts, size, overlap = case
    text = doc.text
    windows = doc_windows(doc, token_starts=lambda _: starts, size=size, overlap=overlap)
    held = set()
    for window in windows:
        end = window.start + len(window.text)
        assert window.text == text[window.start : end] == window.text.strip()
        assert window.text
        assert len(window.text) == 1 or touched(starts, window.start, end) <= size
        held.update(range(window.start, end))
    assert held >= {i for i, char in enumerate(text) if not char.isspace()}
    ends = [w.start + len(w.text) for w in windows]
    assert all(a.start < b.start for a, b in itertools.pairwise(windows))
    assert all(a < b for a, b in itertools.pairwise(ends))


@long_run
@given(cases(unique=True))
def test_windows_overlap_no_more_than_asked(case):
    doc, starts, size, overlap = case
    windows = doc_windows(doc, token_starts=lambda _: starts, size=size, overlap=overlap)
    for before, after in itertools.pairwise(windows):
        end = before.start + len(before.text)
        assert sum(after.start <= start < end for start in starts) <= overlap


@long_run
@given(cases())
def test_windows_cut_only_tokens_that_do_not_fit(case):
    doc, starts, size, overlap = case
    fitting = {
        at
        for token in doc
        if touched(starts, token.idx, token.idx + len(token)) <= size
        for at in range(token.idx + 1, token.idx + len(token.text.rstrip()))
        if doc.text[token.idx : at].strip()
    }
    for window in doc_windows(doc, token_starts=lambda _: starts, size=size, overlap=overlap):
        assert not {window.start, window.start + len(window.text)} & fitting


@long_run
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.integers(6, 14), st.integers(0, 5))
def test_windows_pack_as_one_would_by_hand(lengths, size, overlap):
    packs = [[]]
    for sent in sentences(*lengths).sents:
        if packs[-1] and sum(len(s) for s in packs[-1]) + len(sent) > size:
            packs.append([])
        packs[-1].append(sent)
    assert cut(sentences(*lengths), size, overlap) == [" ".join(s.text for s in pack) for pack in packs]
