"""The inline format: the text again with its entities marked, and where they are found in it."""

import itertools
import math
import re
from typing import List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.annotate import Annotator
from spacy_sam.generate.engine import Completion, Request
from spacy_sam.plan import TaskModelSpec
from spacy_sam.prompts import InlineFormat, Mention, begins_word, ends_word, flatten_text, make_format
from spacy_sam.windows import Window

FORMAT = InlineFormat()
LABELS = ("city", "gene or protein", "a|b")
Spans = List[Tuple[int, int, str]]
texts = st.text(alphabet=st.sampled_from(list("ab ⟨¦⟩|.\n\u2028(é東")), min_size=1, max_size=30)


@st.composite
def annotated(draw) -> Tuple[str, Spans]:
    """A text and entities in it: in order, apart, with no white space at their ends."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8, unique=True)))
    spans = [(start, end, draw(st.sampled_from(LABELS))) for start, end in zip(cuts[::2], cuts[1::2])]
    shown = FORMAT.shown(text)
    return text, [(s, e, label) for s, e, label in spans if s < e and begins_word(shown, s) and ends_word(shown, e)]


def spans_of(mentions: List[Mention]) -> Spans:
    return [(m.at, m.at + len(m.surface), m.label) for m in mentions if m.at is not None]


def test_inline_marks_stand_behind_words():
    text = "The Tate is (IL-2) in London."
    spans = [(4, 8, "museum"), (13, 17, "protein"), (22, 28, "city")]
    assert FORMAT.answer(text, spans) == " The Tate⟨ museum⟩ is (IL⟨ protein⟩-¦2¦) in London⟨ city⟩."


@given(annotated())
def test_inline_answer_is_read_back(example):
    text, spans = example
    parsed = FORMAT.parse(FORMAT.answer(text, spans), LABELS)
    assert (spans_of(parsed.mentions), parsed.n_malformed) == (spans, 0)


@given(annotated())
def test_inline_mentions_are_surfaces_with_their_marks(example):
    """What a mention's score is made of: nothing of the text before it, and no part of another mention."""
    text, spans = example
    answer = FORMAT.answer(text, spans)
    mentions = FORMAT.parse(answer, LABELS).mentions
    for mention in mentions:
        bare = re.sub("⟨ [^⟨⟩]*⟩|¦", "", answer[mention.start : mention.end])
        assert bare == mention.surface
        assert answer[mention.end - 1] in "⟩¦"
    assert all(one.end <= other.start for one, other in itertools.pairwise(mentions))


def test_inline_score_is_that_of_the_surface_and_its_marks():
    """A token for each piece: those of the text before the entity, and after it, are not in its score."""
    pieces = {" In": 0.5, " New": 0.9, "⟨ city⟩": 0.8, " York": 1.0, "¦": 0.7, " it": 0.6, " rains": 0.4}
    ends = [len("".join(list(pieces)[: place + 1])) for place in range(len(pieces))]
    completion = Completion("".join(pieces), tuple(map(math.log, pieces.values())), tuple(ends), True)
    (mention,) = FORMAT.parse(completion.text, LABELS).mentions
    assert mention.surface == "New York"
    assert completion.score(mention.start, mention.end) == pytest.approx(0.9 * 0.8 * 0.7)


@given(annotated())
def test_inline_answer_without_its_marks_is_the_body(example):
    text, _ = example
    assert FORMAT.body(text) == FORMAT.answer(text, []) + "\n"
    assert len(FORMAT.answer(text, [])) == len(flatten_text(text)) + 1


def test_inline_overlaps_and_parts_of_words_are_left_out():
    answer = FORMAT.answer("New York City", [(0, 13, "city"), (4, 8, "county"), (9, 13, "town")])
    assert answer == " New⟨ city⟩ York¦ City¦"
    assert FORMAT.answer("New York", [(1, 3, "city"), (0, 2, "city"), (3, 8, "city"), (0, 4, "city")]) == " New York"


def test_inline_entities_side_by_side_are_two():
    answer = FORMAT.answer("Rome Oslo", [(0, 4, "city"), (5, 9, "city")])
    assert answer == " Rome⟨ city⟩ Oslo⟨ city⟩"
    assert spans_of(FORMAT.parse(answer, LABELS).mentions) == [(0, 4, "city"), (5, 9, "city")]


@given(st.text(alphabet="ab ⟨¦⟩c", max_size=40))
def test_inline_parser_never_fails(completion):
    for mention in FORMAT.parse(completion, ["a", "b c"]).mentions:
        assert mention.label in ("a", "b c")
        assert mention.surface in re.sub("⟨[^⟨⟩¦]*⟩|[⟨⟩¦]", "", completion)
        assert mention.at is None or mention.at >= 0


@pytest.mark.parametrize(
    ("completion", "surfaces", "n_malformed"),
    [
        (" in Rome⟨ town⟩", [], 1),  # not asked
        (" in Rome⟨⟩ x Oslo⟨ city⟩", ["Oslo"], 1),  # no label
        ("⟨ city⟩", [], 1),  # nothing before the mark
        (" in Rome⟨ city", [], 1),  # not closed
        (" in Rome⟨ Oslo⟨ city⟩", ["Oslo"], 1),  # begun twice
        (" New⟨ city⟩ York City¦", ["New"], 1),  # a bar that skips a word
        (" New York¦", [], 1),  # a bar without a beginning
        (" New⟨ town⟩ York¦", [], 2),
        (" New⟨ city⟩¦ York¦", ["New"], 2),
    ],
)
def test_inline_parser_takes_what_it_can(completion, surfaces, n_malformed):
    parsed = FORMAT.parse(completion, LABELS)
    assert ([m.surface for m in parsed.mentions], parsed.n_malformed) == (surfaces, n_malformed)


def test_inline_whole_part_ends_with_the_last_mark():
    assert FORMAT.whole_part(" a b⟨ city⟩ c d⟨ ci") == " a b⟨ city⟩"
    assert FORMAT.whole_part(" a⟨ city⟩ b¦ c") == " a⟨ city⟩ b¦"
    assert FORMAT.whole_part(" a b c") == ""


def test_inline_format_by_name():
    settings = {"name": "spacy_sam.Inline.v1", "instruction": "Do.", "max_labels": 3}
    assert make_format(settings) == InlineFormat("Do.", 3)


class OneAnswer:
    """An engine that always writes the same."""

    context = 512

    def __init__(self, answer: str, finished: bool = True) -> None:
        self.completion = Completion(answer, (-0.1,) * len(answer), tuple(range(1, len(answer) + 1)), finished)

    def generate(self, requests: List[Request]) -> List[Completion]:
        return [self.completion] * len(requests)


def find(text: str, answer: str, start: int = 0, finished: bool = True) -> Tuple[Spans, Annotator]:
    annotator = Annotator(OneAnswer(answer, finished), FORMAT)  # type: ignore[arg-type]
    (found,) = annotator.annotate([TaskModelSpec()], LABELS, [Window(text, start)])
    return [(c.start, c.end, c.label) for c in found], annotator


@given(annotated(), st.integers(0, 50))
def test_inline_annotation_is_exact(example, start):
    text, spans = example
    found, annotator = find(text, FORMAT.answer(text, spans), start)
    assert found == [(s + start, e + start, label) for s, e, label in spans]
    assert annotator.counts.dropped == 0


def test_inline_repeated_words_are_not_mixed_up():
    text = "Paris met Paris in Paris."
    assert find(text, " Paris met Paris in Paris⟨ city⟩.")[0] == [(19, 24, "city")]


def test_inline_slip_in_the_echo_is_searched_for():
    """A word was lost before the entity, so it is placed by its surface."""
    text = "We all met in Paris today."
    found, annotator = find(text, " We met in Paris⟨ city⟩ today morning⟨ city⟩.")
    assert found == [(14, 19, "city")]
    assert annotator.counts.dropped == 1


def test_inline_unfinished_answer_keeps_what_is_closed():
    found, annotator = find("Oslo and Rome", " Oslo⟨ city⟩ and Rome⟨ ci", finished=False)
    assert found == [(0, 4, "city")]
    assert annotator.counts.unfinished == 1


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters=";"), min_size=1), min_size=1), st.text())
def test_inline_prompts_are_read_back(labels, text):
    """For models that answer no other prompts: what was asked, of the text as it is shown."""
    labels = list(dict.fromkeys(" ".join(label.split()) or "x" for label in labels))
    prompt_format = InlineFormat("Do this:\n")
    prompt = prompt_format.prefix(labels) + prompt_format.body(text)
    assert prompt_format.read(prompt) == (tuple(labels), prompt_format.shown(text))


@pytest.mark.parametrize(
    "prompt", ["", "Write a poem.\n", "Types: a; b\n", "Types: a\nText: b", "Types: a\nText: b\nc\n"]
)
def test_inline_other_prompts_are_not_read(prompt):
    assert FORMAT.read(prompt) is None
