"""The prompt format and its parser: what is written can be read back, and what cannot be read is counted."""

import pytest
from helpers import END, PAD, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.errors import SamError
from spacy_sam.prompts import LinesFormat, Mention, PromptEncoder, flatten_text, make_format

LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
FORMAT = LinesFormat()
# Characters that a format of lines and bars could trip over, and any other that UTF-8 can hold.
characters = st.sampled_from(" |;:,.-'\"" + LINE_ENDS + "\t\xa0\u3000\u200b\ufeffaAé漢😀e\u0301") | st.characters(
    exclude_categories=["Cs"]
)
texts = st.text(characters, max_size=60)
plain_labels = st.text(st.sampled_from("abPER ;:é漢-_/&"), min_size=1, max_size=12).map(str.strip).filter(bool)
barred_labels = st.lists(plain_labels, min_size=1, max_size=3).map(" | ".join)


@st.composite
def annotated(draw, texts=texts, labels=plain_labels):
    """A text, the labels asked, and entities: spans that may overlap but are not only white space."""
    text = draw(texts)
    asked = draw(st.lists(labels, min_size=1, max_size=4, unique=True))
    entities = []
    if text:
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(text) - 1))
            end = draw(st.integers(start + 1, len(text)))
            if text[start:end].strip():
                entities.append((start, end, draw(st.sampled_from(asked))))
    return text, asked, entities


def said(text, entities):
    return [(label, flatten_text(text)[start:end].strip()) for start, end, label in sorted(entities)]


# flatten_text


@given(texts)
def test_prompts_flatten_keeps_every_offset(text):
    flat = flatten_text(text)
    assert len(flat) == len(text)
    assert all(new == old or (old.isspace() and new == " ") for old, new in zip(text, flat))


@given(texts)
def test_prompts_flatten_makes_one_line(text):
    assert len(flatten_text(text).splitlines()) <= 1
    assert flatten_text(flatten_text(text)) == flatten_text(text)


@pytest.mark.parametrize("end", LINE_ENDS + "\t\xa0\u3000", ids=repr)
def test_prompts_flatten_replaces_white_space(end):
    assert flatten_text(f"a{end}{end}b") == "a  b"


# Writing


def test_prompts_parts():
    lines = LinesFormat("Find.\n")
    assert lines.prefix(["person", "place"]) == "Find.\nTypes: person; place\nText:"
    assert lines.body("Ann\nin Bern") == " Ann in Bern\nEntities:\n"
    entities = [(7, 11, "place"), (0, 3, "person")]
    assert lines.answer("Ann\nin Bern", entities) == " Ann | person\n Bern | place\n"
    assert lines.answer("Ann\nin Bern", []) == ""


@given(texts)
def test_prompts_body_holds_the_text_on_one_line(text):
    first, second, rest = FORMAT.body(text).split("\n")
    assert (first, second, rest) == (" " + flatten_text(text), "Entities:", "")


@given(annotated())
def test_prompts_answer_is_one_line_for_each_entity_in_order(example):
    text, _, entities = example
    answer = FORMAT.answer(text, reversed(entities))
    assert answer.count("\n") == len(entities) == len(answer.splitlines())
    assert answer == "".join(FORMAT.answer(text, [entity]) for entity in sorted(entities))


# Reading what was written


@given(annotated())
def test_prompts_answer_is_read_back(example):
    text, labels, entities = example
    parsed = FORMAT.parse(FORMAT.answer(text, entities), labels)
    assert [(m.label, m.surface) for m in parsed.mentions] == said(text, entities)
    assert parsed.n_malformed == 0


@given(annotated(texts.map(lambda text: text.replace("|", "/")), barred_labels))
def test_prompts_answer_with_bars_in_labels_is_read_back(example):
    text, labels, entities = example
    for asked in (labels, labels[::-1]):
        parsed = FORMAT.parse(FORMAT.answer(text, entities), asked)
        assert [(m.label, m.surface) for m in parsed.mentions] == said(text, entities)


@given(annotated())
def test_prompts_mentions_know_their_place_in_the_completion(example):
    text, labels, entities = example
    answer = FORMAT.answer(text, entities)
    mentions = FORMAT.parse(answer, labels).mentions
    assert "".join(answer[m.start : m.end] for m in mentions) == answer
    for mention in mentions:
        again = FORMAT.parse(answer[mention.start : mention.end], labels).mentions
        assert [(m.label, m.surface) for m in again] == [(mention.label, mention.surface)]


def test_prompts_places_count_lines_that_were_skipped():
    completion = "what?\n\n Ann | person\nnonsense | thing\n Bern | place"
    parsed = FORMAT.parse(completion, ["person", "place"])
    assert parsed == ([Mention("person", "Ann", 7, 21), Mention("place", "Bern", 38, 51)], 2)
    assert [completion[m.start : m.end] for m in parsed.mentions] == [" Ann | person\n", " Bern | place"]


@pytest.mark.parametrize("end", [c for c in LINE_ENDS if c not in "\n\r"], ids=repr)
def test_prompts_only_newlines_end_a_line(end):
    completion = f" Ann{end}Lee | person\n Bern | place\n"
    parsed = FORMAT.parse(completion, ["person", "place"])
    assert [m.surface for m in parsed.mentions] == [f"Ann{end}Lee", "Bern"]
    assert parsed.n_malformed == 0
    assert "".join(completion[m.start : m.end] for m in parsed.mentions) == completion


# Reading what a model makes up


@pytest.mark.parametrize(
    ("completion", "mentions", "n_malformed"),
    [
        ("", [], 0),
        ("\n \n\t\n", [], 0),
        (" Ann | person", [("person", "Ann")], 0),
        ("Ann | person\n", [("person", "Ann")], 0),
        ("  Ann  | person  \n", [("person", "Ann")], 0),
        (" Ann | person\r\n Bern | place\r\n", [("person", "Ann"), ("place", "Bern")], 0),
        (" Ann | person\n Ann | person\n", [("person", "Ann"), ("person", "Ann")], 0),
        (" Ann | place\n Ann | person\n", [("place", "Ann"), ("person", "Ann")], 0),
        (" x | place | person\n", [("person", "x | place")], 0),
        (" a|b | person\n", [("person", "a|b")], 0),
        (" | | person\n", [("person", "|")], 0),
        (" Ann | Person\n", [], 1),
        (" Ann | persons\n", [], 1),
        (" Ann | \n", [], 1),
        (" Ann |person\n", [], 1),
        (" Ann\n", [], 1),
        (" | person\n", [], 1),
        ("   | person\n", [], 1),
        ("person\n | \n|\n", [], 3),
        (" Ann | person\n Bern | pla", [("person", "Ann")], 1),
    ],
)
def test_prompts_parser_takes_what_it_can(completion, mentions, n_malformed):
    parsed = FORMAT.parse(completion, ["person", "place"])
    assert [(m.label, m.surface) for m in parsed.mentions] == mentions
    assert parsed.n_malformed == n_malformed


@pytest.mark.parametrize("labels", [["b", "a | b"], ["a | b", "b"]])
def test_prompts_longest_label_wins(labels):
    (mention,) = FORMAT.parse(" x | a | b\n", labels).mentions
    assert (mention.label, mention.surface) == ("a | b", "x")


@given(texts, st.lists(barred_labels, max_size=3))
def test_prompts_parser_never_fails(completion, labels):
    parsed = FORMAT.parse(completion, labels)
    lines = [line for line in completion.split("\n") if line.strip()]
    assert len(parsed.mentions) + parsed.n_malformed == len(lines)
    for mention in parsed.mentions:
        assert mention.label in labels
        assert mention.surface in completion[mention.start : mention.end]
        assert mention.surface == mention.surface.strip() != ""


# Formats by name


def test_prompts_format_by_name():
    assert make_format({"name": "spacy_sam.Lines.v1", "instruction": "Do."}) == LinesFormat("Do.")
    assert make_format({"name": "spacy_sam.Lines.v1"}) == LinesFormat()


@pytest.mark.parametrize(
    "settings", [{}, {"name": "spacy_sam.Lines.v0"}, {"name": "spacy_sam.Lines.v1", "bullet": "-"}]
)
def test_prompts_unknown_format_is_refused(settings):
    with pytest.raises(SamError, match=r"^\[S201\]") as caught:
        make_format(settings)
    assert "spacy_sam.Lines.v1" in str(caught.value)


# Tokens


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(make_tokenizer(), FORMAT)


@pytest.mark.parametrize("name", [PAD, END, f"Say {END} and {END}{PAD}!"])
def test_prompts_special_tokens_in_a_text_are_text(encoder, name):
    special = set(encoder.tokenizer.all_special_ids)
    assert special.isdisjoint(encoder.prefix([name]))
    assert special.isdisjoint(encoder.body(name))
    assert special.isdisjoint(encoder.answer(name, [(0, len(name), name)])[:-1])
    assert encoder.decode(encoder.body(name))[0] == FORMAT.body(name)


def test_prompts_answer_ends_with_the_end_token_alone(encoder):
    end = encoder.tokenizer.eos_token_id
    assert encoder.answer("Bern", []) == [end]
    tokens = encoder.answer("Bern", [(0, 4, "place")])
    assert tokens.count(end) == 1
    assert tokens[-1] == end
    assert encoder.decode(tokens)[0] == " Bern | place\n"


@pytest.mark.parametrize("begin", [None, PAD])
def test_prompts_begin_token_stands_first_if_there_is_one(begin):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = begin
    encoder = PromptEncoder(tokenizer, FORMAT)
    start = [] if begin is None else [tokenizer.bos_token_id]
    assert encoder.prefix(["place"]) == start + encoder.plain(FORMAT.prefix(["place"]))
    assert tokenizer.bos_token_id not in encoder.body("Bern")


@given(texts)
def test_prompts_tokens_of_a_text_decode_to_it(encoder, text):
    tokens = encoder.plain(text)
    decoded, ends = encoder.decode(tokens)
    assert decoded == text
    assert len(ends) == len(tokens)
    assert ends == sorted(ends)
    assert ends[-1:] == [len(text)][: len(tokens)]
    assert all(0 <= end <= len(text) for end in ends)


@given(st.text(st.sampled_from("abc Bern|\n"), max_size=30))
def test_prompts_ends_stand_where_each_token_ends(encoder, text):
    tokens = encoder.plain(text)
    decoded, ends = encoder.decode(tokens)
    begins = [0, *ends][:-1]
    pieces = [decoded[begin:end] for begin, end in zip(begins, ends)]
    assert pieces == [encoder.decode([token])[0] for token in tokens]


@given(texts)
def test_prompts_starts_are_the_characters_where_tokens_begin(encoder, text):
    starts = encoder.starts(text)
    assert starts == sorted(starts)
    assert starts[:1] == [0][: len(text)]
    assert all(0 <= start < len(text) for start in starts)
    pieces = [text[b:e] for b, e in zip(starts, [*starts[1:], len(text)])]
    assert "".join(pieces) == text
    assert len(starts) == len(encoder.plain(flatten_text(text)))
