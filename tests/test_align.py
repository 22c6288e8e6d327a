import random
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spacy_sam.align import Candidate, Placed, Scored, align, resolve_overlaps, union
from spacy_sam.prompts import LinesFormat, flatten_text

long_run = settings(deadline=None, max_examples=400)
# Letters that compose, fold to two, join or stand in words without spaces; and what parts words.
ALPHABET = "abAB1_.-' \n\u00a0\u3000éÉe\u0301iIİıßﬁ①Ａ中国東ｶﾞカกำ่한ᄒ\u1161\u11ab👩🏽\u200d❤\ufe0f¨"
tricky_texts = st.text(ALPHABET, max_size=30)
any_texts = st.text(st.characters(exclude_categories=()), max_size=30)


def place(text, *surfaces, offset=0):
    """Extents of surfaces, each `surface` or `surface|label`, and the number of dropped ones."""
    mentions = [Scored(*reversed(s.split("|")), 1.0) if "|" in s else Scored("X", s, 1.0) for s in surfaces]
    placed, n_dropped = align(mentions, text, offset)
    assert all(p.score == 1.0 for p in placed)
    return [(p.start, p.end) if p.label == "X" else (p.start, p.end, p.label) for p in placed], n_dropped


def places(text, *surfaces):
    extents, n_dropped = place(text, *surfaces)
    assert n_dropped == len(surfaces) - len(extents)
    return extents


# Which text is named


def test_align_exact_offsets_scores_and_order():
    mentions = [Scored("PER", "Ann", 0.5), Scored("LOC", "New York", 0.25)]
    assert align(mentions, "Ann is in New York.", 100) == (
        [Placed(100, 103, "PER", 0.5), Placed(110, 118, "LOC", 0.25)],
        0,
    )


def test_align_nothing():
    assert align([], "Ann") == ([], 0)
    assert align([Scored("PER", "Ann", 1.0)], "") == ([], 1)


@pytest.mark.parametrize("surface", ["", " ", "\n\t", "\u3000", "Bob", "Ann ran far", "\u0301"])
def test_align_drops_what_is_not_in_the_text(surface):
    assert place("Ann ran.\n", surface) == ([], 1)


def test_align_exact_before_caseless_before_compatible():
    assert places("apple Apple", "Apple") == [(6, 11)]
    # An exact surface does not spread to other spellings: the pronoun is no country.
    assert place("US told us", "US", "US") == ([(0, 2)], 1)
    assert places("Ａpple APPLE", "apple") == [(6, 11)]
    assert places("Ａpple APPLE Apple", "Apple") == [(12, 17)]


def test_align_ignores_case_when_it_must():
    assert places("the WHO and NATO", "who", "Nato") == [(4, 7), (12, 16)]
    assert place("WHO, Who", "who", "who", "who") == ([(0, 3), (5, 8)], 1)


@pytest.mark.parametrize(
    ("text", "surface", "extent"),
    [
        ("Die STRASSE hier", "Straße", (4, 11)),
        ("Die Straße hier", "STRASSE", (4, 10)),
        ("in İstanbul da", "istanbul", (3, 11)),
        ("in istanbul da", "İstanbul", (3, 11)),
        ("İİİ in DİYARBAKIR, x", "Diyarbakır", (7, 17)),
        ("in I\u0307stanbul da", "istanbul", (3, 12)),
        ("the ﬁnal ﬂoor", "FINAL FLOOR", (4, 13)),
        ("ΟΔΟΣ", "οδος", (0, 4)),
    ],
)
def test_align_case_that_changes_length(text, surface, extent):
    assert places(text, surface) == [extent]


@pytest.mark.parametrize(
    ("text", "surface", "extent"),
    [
        ("at New   York now", "New York", (3, 13)),
        ("at New York now", "New   York", (3, 11)),
        ("at New\r\n\tYork now", "new york", (3, 13)),
        ("the Cafe\u0301 Noir", "Café", (4, 9)),
        ("the Café Noir", "Cafe\u0301", (4, 8)),
        ("ab ＡＢＣ１ cd", "ABC1", (3, 7)),
        ("ｶﾞﾗｽ", "ガラス", (0, 4)),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8", "\ud55c\uad6d", (0, 6)),
        ("a ½ cup", "1⁄2", (2, 3)),
        ("x² + y", "x2", (0, 2)),
    ],
)
def test_align_compatible_forms(text, surface, extent):
    assert places(text, surface) == [extent]


@pytest.mark.parametrize(
    ("text", "surface"),
    [("ﬁ", "f"), ("ﬁ", "i"), ("ß", "s"), ("½", "1"), ("½", "2"), ("㍿会社", "会社会社")],
)
def test_align_never_takes_a_part_of_a_character(text, surface):
    assert place(text, surface) == ([], 1)


def test_align_any_white_space_is_a_space():
    # The prompt shows a line break as a space, so this is an exact match and goes before another case.
    assert places("NEW YORK, New\nYork, New\u00a0York", "New York", "New York") == [(10, 18), (20, 28)]
    assert places("New York", "New\nYork") == [(0, 8)]
    assert places("a\u2028b\x85c", "a b", "b c") == [(0, 3), (2, 5)]
    assert places("NEW  YORK, NEW\nYORK", "New York") == [(11, 19)]


def test_align_never_begins_with_white_space():
    # The compatible form of a spacing mark begins with a space.
    assert place("x \u0308y", "\u00a8y") == ([], 1)


@pytest.mark.parametrize("surface", [" Ann", "Ann\n", "\u3000Ann "])
def test_align_strips_surfaces(surface):
    assert places("so Ann ran", surface) == [(3, 6)]


# Word boundaries


@pytest.mark.parametrize(
    "text", ["bus", "USA", "us1", "1us", "cafe us\u0301", "e\u0301us", "aus us\u0301ed", "Übus", "usß", "us\u200d"]
)
def test_align_never_inside_a_word(text):
    assert place(text, "us") == ([], 1)


@pytest.mark.parametrize(
    "text", ["us", "(us)", "us's", "_us_", "x-us-y", "the\nus.", "❤️us", "#us,", "$us%", "us\u200b"]
)
def test_align_between_other_characters(text):
    at = text.index("us")
    assert places(text, "us") == [(at, at + 2)]


def test_align_word_boundaries_hold_in_every_reading():
    assert place("bus USA MUSE", "us") == ([], 1)
    assert places("bus USA (US)", "us") == [(9, 11)]
    assert place("ｂｕｓ ＵＳＡ", "us") == ([], 1)
    assert place("abbaXabba", "Xabba") == ([], 1)
    assert places("aab ab", "ab") == [(4, 6)]


def test_align_after_a_rejected_place_finds_an_overlapping_one():
    assert places("xa-a-a.", "a-a") == [(3, 6)]
    assert places("👩‍🚀🚀🚀", "🚀🚀") == [(3, 5)]
    # The reading that finds it is shorter than the text.
    assert places("x" + " " * 20 + "bab1 ＡＢ", "ab") == [(26, 28)]


@pytest.mark.parametrize(
    ("text", "surface"),
    [
        ("我在北京大学学习", "北京大学"),
        ("東京タワーへ行く", "東京タワー"),
        ("私はiPhoneを買う", "iPhone"),
        ("เขาไปกรุงเทพมหานครวันนี้", "กรุงเทพมหานคร"),
        ("그는 서울에서 산다", "서울"),
        ("ຢູ່ວຽງຈັນໃນ", "ວຽງຈັນ"),
        ("នៅភ្នំពេញថ្ងៃ", "ភ្នំពេញ"),
        ("𠀀𠀁𠀂", "𠀁"),
    ],
)
def test_align_inside_a_run_of_a_script_without_spaces(text, surface):
    at = text.index(surface)
    assert places(text, surface) == [(at, at + len(surface))]


@pytest.mark.parametrize(
    ("text", "surface"),
    [
        ("cafe\u0301", "cafe"),
        ("ก่า", "ก"),
        ("ｶﾞ", "ｶ"),
        ("\u1100\u1161\u11a8", "\u1100\u1161"),
        ("👩‍🚀", "👩"),
        ("👩‍🚀", "🚀"),
        ("👍🏽", "👍"),
        ("❤️", "❤"),
    ],
)
def test_align_never_splits_what_is_read_as_one(text, surface):
    assert place(text, surface) == ([], 1)


def test_align_after_emoji_counts_characters():
    assert places("👩‍🚀👍🏽 Ann 👩‍🚀 Ann", "Ann", "👩‍🚀", "Ann") == [(6, 9), (10, 13), (14, 17)]


# Which occurrence


def test_align_repeats_take_the_next_occurrence():
    assert place("Ann, Ann, Ann", "Ann", "Ann", "Ann", "Ann") == ([(0, 3), (5, 8), (10, 13)], 1)


def test_align_order_of_appearance():
    text = "Ann met Bob. Bob met Ann. Cid"
    assert places(text, "Bob", "Ann", "Cid") == [(8, 11), (21, 24), (26, 29)]
    assert places(text, "Ann", "Bob", "Bob", "Ann") == [(0, 3), (8, 11), (13, 16), (21, 24)]


def test_align_goes_back_for_what_is_only_before_and_stays():
    text = "Ann met Bob. Bob met Cid. Bob"
    assert places(text, "Cid", "Ann", "Bob") == [(21, 24), (0, 3), (26, 29)]
    assert place(text, "Cid", "Bob", "Bob", "Bob", "Bob") == ([(21, 24), (26, 29), (8, 11), (13, 16)], 1)


def test_align_a_name_in_another_name_is_the_last_choice():
    text = "Smith College hired Smith. Smith left."
    assert places(text, "Smith College", "Smith", "Smith") == [(0, 13), (20, 25), (27, 32)]
    assert place(text, "Smith College", "Smith", "Smith", "Smith", "Smith") == (
        [(0, 13), (20, 25), (27, 32), (0, 5)],
        1,
    )


def test_align_goes_on_from_what_is_furthest_on():
    assert places("Bo. Bo Li", "Bo Li", "Bo", "Bo") == [(4, 9), (4, 6), (0, 2)]
    assert places("Bo. Ann. Bo. Bo Li", "Bo Li", "Ann", "Bo") == [(13, 18), (4, 7), (13, 15)]


def test_align_nested_and_crossing():
    assert places("Bank of England", "Bank of England", "England", "Bank") == [(0, 15), (8, 15), (0, 4)]
    assert places("New York City Hall", "New York City", "City Hall") == [(0, 13), (9, 18)]


def test_align_occurrences_of_a_surface_do_not_overlap():
    assert place("ha ha ha ha", "ha ha", "ha ha", "ha ha") == ([(0, 5), (6, 11)], 1)
    assert places("哈哈哈哈", "哈哈", "哈哈") == [(0, 2), (2, 4)]


def test_align_two_labels_take_two_occurrences():
    assert places("Paris, Paris", "Paris|LOC", "Paris|ORG") == [(0, 5, "LOC"), (7, 12, "ORG")]
    assert places("Bob, Bob, Cid", "Cid", "Bob|PER", "Bob|ORG") == [(10, 13), (0, 3, "PER"), (5, 8, "ORG")]


def test_align_two_labels_share_the_only_occurrence():
    assert places("Paris, Rome", "Paris|LOC", "Paris|ORG", "Rome") == [(0, 5, "LOC"), (0, 5, "ORG"), (7, 11)]
    assert place("Paris", "Paris|LOC", "Paris|LOC", "Paris|ORG", "Paris|ORG") == ([(0, 5, "LOC"), (0, 5, "ORG")], 2)
    assert places("Paris, Rome", "Paris|LOC", "Rome", "Paris|ORG") == [(0, 5, "LOC"), (7, 11), (0, 5, "ORG")]
    labels = ["Paris|LOC", "Paris|ORG"]
    both = {(start, start + 5, label) for start in (0, 7) for label in ("LOC", "ORG")}
    assert set(places("Paris, Paris", *labels, *labels)) == both
    assert place("Paris, Paris", *labels, *labels, *labels)[1] == 2


def test_align_spellings_share_what_is_taken():
    assert place("Apple", "Apple", "apple", "APPLE|ORG") == ([(0, 5), (0, 5, "ORG")], 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["a" * 100_000, "-" * 100_000, "Ann met Bob in New York, ab1. " * 3_000, "a\u0301b " * 10_000]
)
def test_align_linear_in_long_texts(text):
    rng = random.Random(0)
    mentions = []
    for number in range(50):
        start = rng.randrange(len(text))
        mentions += [Scored("X", text[start : start + number], 1.0), Scored("X", f"a{number}", 1.0)]
    mentions += [Scored(str(number % 3), "a" * (1000 + number), 1.0) for number in range(50)]
    placed, n_dropped = align(mentions, text)
    assert len(placed) + n_dropped == len(mentions)


@pytest.mark.timeout(60)
def test_align_linear_in_many_mentions():
    n_words = 20_000
    mentions = [Scored(label, "a", 1.0) for label in "XYXY" for _ in range(n_words)]
    placed, n_dropped = align(mentions, "a " * n_words)
    assert len({p[:3] for p in placed}) == len(placed) == n_dropped == 2 * n_words


# Against a slow and obvious version


def is_edge(text, at):
    if at in (0, len(text)):
        return True
    pair = text[at - 1 : at + 1]
    if "\u200d" in pair or pair[1] in "🏽" or unicodedata.category(pair[1])[0] == "M" or pair[1] in "ﾞำ\u1161\u11ab":
        return False
    letters = all(c.isalnum() or (unicodedata.category(c)[0] == "M" and c != "\ufe0f") for c in pair)
    unspaced = any(re.search("CJK|KATAKANA|THAI|HANGUL", unicodedata.name(c, "")) for c in pair)
    return not letters or unspaced


def fold(text):
    return "".join("i" if c in "İı" else c.casefold() for c in text)


def compatible(text):
    return fold(unicodedata.normalize("NFKC", re.sub(r"\s+", " ", text)))


def obvious_occurrences(surface, text):
    if not surface.strip():
        return []
    for read in (flatten_text, lambda t: fold(flatten_text(t)), compatible):
        found = []
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                named = text[start:end]
                alike = named == named.strip() and read(named) == read(surface.strip())
                if alike and is_edge(text, start) and is_edge(text, end) and (not found or start >= found[-1][1]):
                    found.append((start, end))
        if found:
            return found
    return []


def obvious_align(mentions, text):
    placed = []
    for label, surface, score in mentions:
        everywhere = obvious_occurrences(surface, text)
        cursor = max((p.start for p in placed), default=0)
        frontier = max((p.end for p in placed), default=0)
        taken = {(p.start, p.end) for p in placed}
        taken_by_label = {(p.start, p.end) for p in placed if p.label == label}
        choices = [e for e in everywhere if e[0] >= frontier]
        for closed in (taken, taken_by_label):
            choices += [e for e in everywhere if e[0] >= cursor and e not in closed]
            choices += [e for e in everywhere if e not in closed]
        if choices:
            placed.append(Placed(*choices[0], label, score))
    return placed, len(mentions) - len(placed)


@st.composite
def answers(draw, text_strategy):
    """A text, and mentions of pieces of it, respelled pieces and other strings."""
    text = draw(text_strategy)
    respell = [str, str.upper, str.lower, lambda s: unicodedata.normalize("NFKD", s), lambda s: s.replace(" ", "  ")]
    mentions = []
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, len(text)))
        piece = text[start : start + draw(st.integers(0, 6))]
        surface = draw(text_strategy) if draw(st.integers(0, 9)) == 0 else draw(st.sampled_from(respell))(piece)
        mentions.append(Scored(draw(st.sampled_from("XY")), surface, draw(st.floats(-1, 1))))
    return text, mentions


@long_run
@given(answers(tricky_texts))
def test_align_as_the_obvious_version(case):
    text, mentions = case
    assert align(mentions, text) == obvious_align(mentions, text)


@long_run
@given(answers(st.text("ab .", max_size=14)))
def test_align_chooses_as_the_obvious_version(case):
    text, mentions = case
    assert align(mentions, text) == obvious_align(mentions, text)


@long_run
@given(st.one_of(answers(any_texts), answers(tricky_texts)), st.integers(0, 10**6))
def test_align_places_only_what_is_named(case, offset):
    text, mentions = case
    placed, n_dropped = align(mentions, text, offset)
    assert len(placed) + n_dropped == len(mentions)
    assert len({p[:3] for p in placed}) == len(placed)
    surfaces = {(m.label, m.score, compatible(m.surface.strip())) for m in mentions}
    for start, end, label, score in placed:
        assert offset <= start < end <= offset + len(text)
        named = text[start - offset : end - offset]
        assert named == named.strip()
        assert (label, score, compatible(named)) in surfaces


@st.composite
def annotated(draw):
    """A text of few words, and non-overlapping spans of one to three words such that each surface is complete."""
    vocabulary = [
        "Ann",
        "ann",
        "us",
        "USA",
        "bus",
        "New",
        "York",
        "é",
        "e\u0301",
        "İo",
        "北京",
        "👩‍🚀",
        "Straße",
        "U.S.",
    ]
    separators = [" ", " ", "\n", ", ", "\u00a0", "\t\t"]
    words = draw(st.lists(st.tuples(st.sampled_from(vocabulary), st.sampled_from(separators)), min_size=1, max_size=14))
    text = ""
    extents = []
    for word, separator in words:
        extents.append((len(text), len(text) + len(word)))
        text += word + separator
    spans = []
    at = 0
    while at < len(words):
        n_words = draw(st.integers(0, min(3, len(words) - at)))
        if n_words:
            spans.append((extents[at][0], extents[at + n_words - 1][1], draw(st.sampled_from(["LOC", "PER"]))))
        at += max(n_words, 1)
    surfaces = [flatten_text(text[start:end]) for start, end, _ in spans]
    complete = [len(obvious_mentions(flatten_text(text), s)) == surfaces.count(s) for s in surfaces]
    return text, [span for span, is_complete in zip(spans, complete) if is_complete]


def obvious_mentions(text, surface):
    at = [i for i in range(len(text)) if text.startswith(surface, i)]
    return [i for i in at if is_edge(text, i) and is_edge(text, i + len(surface))]


@long_run
@given(annotated())
def test_align_gives_back_what_a_prompt_was_made_of(case):
    text, spans = case
    lines = LinesFormat()
    parsed = lines.parse(lines.answer(text, spans), ["LOC", "PER"])
    mentions = [Scored(mention.label, mention.surface, 1.0) for mention in parsed.mentions]
    placed, n_dropped = align(mentions, text)
    assert [p[:3] for p in placed] == spans
    assert n_dropped == 0


# Several answers


def test_union_merges_equal_spans():
    first = [Placed(5, 8, "PER", 0.5), Placed(0, 3, "PER", 0.9)]
    second = [Placed(0, 3, "PER", 0.2), Placed(0, 3, "LOC", 0.3), Placed(5, 8, "PER", 0.75), Placed(5, 8, "PER", 0.1)]
    assert union(first, [], second) == [
        Candidate(0, 3, "LOC", 0.3, (2,)),
        Candidate(0, 3, "PER", 0.9, (0, 2)),
        Candidate(5, 8, "PER", 0.75, (0, 2)),
    ]
    assert union() == union([], []) == []
    assert union([Placed(0, 1, "X", -2.0)]) == [Candidate(0, 1, "X", -2.0, (0,))]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Candidate(2, 3, "A", 0.9, (1,)), Candidate(0, 9, "A", 0.8, (0, 1))),
        (Candidate(0, 3, "A", 0.9, (0, 1)), Candidate(0, 9, "A", 0.9, (0,))),
        (Candidate(2, 9, "A", 0.9, (0,)), Candidate(0, 3, "A", 0.9, (0,))),
        (Candidate(0, 4, "B", 0.9, (0,)), Candidate(2, 6, "A", 0.9, (0,))),
        (Candidate(0, 4, "A", 0.9, (0,)), Candidate(0, 4, "B", 0.9, (0,))),
        (Candidate(3, 4, "A", 0.9, (0,)), Candidate(0, 9, "B", 0.1, (0,))),
        (Candidate(0, 9, "B", 0.9, (0,)), Candidate(3, 4, "A", 0.1, (0,))),
    ],
)
def test_resolve_overlaps_order_of_preference(better, worse):
    assert resolve_overlaps([better, worse]) == resolve_overlaps([worse, better]) == [better]


def test_resolve_overlaps_keeps_neighbours_sorted():
    candidates = [Candidate(start, start + 3, "A", 0.1 * start, (0,)) for start in (6, 0, 3)]
    assert resolve_overlaps(candidates) == sorted(candidates)
    assert resolve_overlaps([]) == []
    # What was dropped itself drops nothing.
    chain = [Candidate(0, 4, "A", 0.5, (0,)), Candidate(3, 7, "A", 0.6, (0,)), Candidate(6, 9, "A", 0.7, (0,))]
    assert resolve_overlaps(chain) == [chain[0], chain[2]]


@st.composite
def candidate_lists(draw):
    extents = st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda e: (e[0], e[0] + e[1]))
    scores = st.sampled_from([0.1, 0.5, 0.9])
    mentions = st.builds(lambda e, label, score: Placed(*e, label, score), extents, st.sampled_from("AB"), scores)
    return union(*draw(st.lists(st.lists(mentions, max_size=8), max_size=3)))


@long_run
@given(candidate_lists(), st.integers(0, 99))
def test_resolve_overlaps_as_the_obvious_version(candidates, seed):
    expected = []
    for c in sorted(candidates, key=lambda c: (-c.score, -len(c.sources), c.start - c.end, c.start, c.label)):
        if all(c.end <= kept.start or kept.end <= c.start for kept in expected):
            expected.append(c)
    random.Random(seed).shuffle(candidates)
    assert resolve_overlaps(candidates) == sorted(expected)


@given(candidate_lists(), st.sampled_from([0.1, 0.5, 0.9]))
def test_resolve_overlaps_before_or_after_a_threshold(candidates, threshold):
    kept = [candidate for candidate in candidates if candidate.score >= threshold]
    assert resolve_overlaps(kept) == [c for c in resolve_overlaps(candidates) if c.score >= threshold]
