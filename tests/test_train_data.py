"""Corpora in every format, what prompts ask of them, and the schedule of batches."""

import json
import random
from collections import Counter
from typing import Any, Dict, List

import pytest
import spacy
from helpers import END, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from spacy.tokens import Doc, DocBin, Span

from spacy_sam.errors import SamError
from spacy_sam.prompts import LinesFormat, PromptEncoder
from spacy_sam.train.data import Dataset, Record, ask, draw_batches, encode_example, load_dataset, read_records, rename


def raises(code):
    return pytest.raises(SamError, match=rf"^\[{code}\]")


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf8"))
    return path


def surfaces(record):
    return [(record.text[start:end], label) for start, end, label in record.entities]


# JSONL


def test_train_data_jsonl(tmp_path):
    rows: List[Dict[str, Any]] = [
        {"text": "Ann is in Bern.", "entities": [[10, 14, "place"], [0, 3, "person"]]},
        {"text": "Nobody\u2028here\x85.", "entities": []},
        {"text": "日本 😀 Zürich", "entities": [[5, 11, "place"], [0, 2, "place"]], "source": "made up"},
        {"text": "New York City", "entities": [[0, 13, "place"], [4, 8, "county"]]},
    ]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    records = read_records(write(tmp_path, "a.jsonl", content))
    assert [r.text for r in records] == [row["text"] for row in rows]
    assert [surfaces(r) for r in records] == [
        [("Ann", "person"), ("Bern", "place")],
        [],
        [("日本", "place"), ("Zürich", "place")],
        [("New York City", "place"), ("York", "county")],
    ]


def test_train_data_jsonl_with_types_of_each_text(tmp_path):
    """A text may name the types that were looked for in it; they are types of the corpus, too."""
    rows: List[Dict[str, Any]] = [
        {"text": "Ann is in Bern.", "entities": [[10, 14, "town"]], "labels": ["town", "dog"]},
        {"text": "Nobody is here.", "entities": [], "labels": ["cat"]},
        {"text": "Ann", "entities": [[0, 3, "person"]]},
        {"text": "Ann", "entities": [], "labels": None},
        {"text": "Ann", "entities": [], "labels": []},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [record.labels for record in read_records(path)] == [("town", "dog"), ("cat",), None, None, ()]
    assert load_dataset(path).labels == ("cat", "dog", "person", "town")


@given(st.data())
def test_train_data_jsonl_is_read_as_written(tmp_path_factory, data):
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, len(text)), st.text(min_size=1, max_size=5))
    entities = data.draw(st.lists(spans.filter(lambda span: span[0] < span[1]), max_size=4))
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text(
        json.dumps({"text": text, "entities": entities}, ensure_ascii=data.draw(st.booleans())), encoding="utf8"
    )
    assert read_records(path) == [Record(text, tuple(sorted(entities)))]


GOOD = '{"text": "Ann", "entities": [[0, 3, "person"]]}\n'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"Ann"',
        "5",
        "null",
        '{"text": "Ann"}',
        '{"entities": []}',
        '{"text": 5, "entities": []}',
        '{"text": null, "entities": []}',
        '{"text": "Ann", "entities": 5}',
        '{"text": "Ann", "entities": [[0, 3]]}',
        '{"text": "Ann", "entities": ["012"]}',
        '{"text": "Ann", "entities": [[0, 3, "person", 1]]}',
        '{"text": "Ann", "entities": [[0, 4, "person"]]}',
        '{"text": "Ann", "entities": [[-1, 3, "person"]]}',
        '{"text": "Ann", "entities": [[2, 2, "person"]]}',
        '{"text": "Ann", "entities": [[3, 0, "person"]]}',
        '{"text": "Ann", "entities": [[0, 3, ""]]}',
        '{"text": "Ann", "entities": [[0, 3, null]]}',
        '{"text": "Ann", "entities": [["0", "3", "person"]]}',
        '{"text": "Ann", "entities": [[0.0, 2.7, "person"]]}',
        '{"text": "Ann", "entities": [[0, Infinity, "person"]]}',
        '{"text": "Ann", "entities": [[0, true, "person"]]}',
        '{"text": "\\ud800", "entities": []}',
        '{"text": "Ann", "entities": [], "labels": "person"}',
        '{"text": "Ann", "entities": [], "labels": {"person": 1}}',
        '{"text": "Ann", "entities": [], "labels": [5]}',
        '{"text": "Ann", "entities": [], "labels": [""]}',
        '{"text": "Ann", "entities": [], "labels": ["person", "person"]}',
        '{"text": "Ann", "entities": [[0, 3, "person"]], "labels": ["place"]}',
        '{"text": "Ann", "entities": [[0, 3, "person"]], "labels": []}',
    ],
)
def test_train_data_malformed_jsonl_names_the_line(line, tmp_path):
    path = write(tmp_path, "a.jsonl", f"{GOOD}\n{line}\n{GOOD}")
    with raises("S603") as caught:
        read_records(path)
    assert caught.value.fields["line"] == 3
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("suffix", "good"), [("jsonl", GOOD), ("conll", "Ann B-person\n")])
def test_train_data_other_encodings_are_refused(suffix, good, tmp_path):
    path = write(tmp_path, f"a.{suffix}", good.encode("utf8") + good.replace("Ann", "Zoë").encode("latin1"))
    with raises("S603"):
        read_records(path)


@pytest.mark.parametrize(("suffix", "good"), [("jsonl", GOOD), ("conll", "Ann B-person\n")])
def test_train_data_byte_order_mark_is_no_text(suffix, good, tmp_path):
    (record,) = read_records(write(tmp_path, f"a.{suffix}", b"\xef\xbb\xbf" + good.encode("utf8")))
    assert record == Record("Ann", ((0, 3, "person"),))


@pytest.mark.parametrize("name", ["none.jsonl", "a.txt", "a.json", "a", "folder.jsonl"])
def test_train_data_unknown_files_are_refused(name, tmp_path):
    write(tmp_path, "a.txt", GOOD)
    write(tmp_path, "a.json", GOOD)
    write(tmp_path, "a", GOOD)
    (tmp_path / "folder.jsonl").mkdir()
    with raises("S602") as caught:
        read_records(tmp_path / name)
    assert name in str(caught.value)


# DocBin


def test_train_data_docbin(tmp_path):
    nlp = spacy.blank("en")
    first = nlp("Ann  is in\tZürich, U.S.A.\n")
    first.ents = [Span(first, 0, 1, "person"), Span(first, 5, 6, "place")]
    second = nlp("Nothing here.")
    third = Doc(nlp.vocab, words=["New", "York", "'s"], spaces=[True, False, False])
    third.ents = [Span(third, 0, 2, "place")]
    path = tmp_path / "a.spacy"
    DocBin(docs=[first, second, third]).to_disk(path)
    records = read_records(path)
    assert [r.text for r in records] == [first.text, second.text, "New York's"]
    assert [surfaces(r) for r in records] == [[("Ann", "person"), ("Zürich", "place")], [], [("New York", "place")]]


@pytest.mark.parametrize("content", [b"", b"not a DocBin", b"\x78\x9c\x03\x00\x00\x00\x00\x01", GOOD])
def test_train_data_broken_docbin_is_refused(content, tmp_path):
    with raises("S603"):
        read_records(write(tmp_path, "a.spacy", content))


def test_train_data_truncated_docbin_is_refused(tmp_path):
    content = DocBin(docs=[spacy.blank("en")("Ann is in Bern.")]).to_bytes()
    with raises("S603"):
        read_records(write(tmp_path, "a.spacy", content[: len(content) // 2]))


# CoNLL


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("O O O", []),
        ("B-X O O", [("a", "X")]),
        ("B-X I-X I-X", [("a bb ccc", "X")]),
        ("B-X B-X I-X", [("a", "X"), ("bb ccc", "X")]),  # both: B after another of its type
        ("I-X I-X O", [("a bb", "X")]),  # IOB1 begins with I
        ("I-X B-X I-X", [("a", "X"), ("bb ccc", "X")]),  # IOB1: B parts neighbours
        ("I-X I-Y I-Y", [("a", "X"), ("bb ccc", "Y")]),
        ("B-X I-Y O", [("a", "X"), ("bb", "Y")]),
        ("I-X O I-X", [("a", "X"), ("ccc", "X")]),
        ("O I-X B-Y", [("bb", "X"), ("ccc", "Y")]),
        ("B-X-Y I-X-Y I-X", [("a bb", "X-Y"), ("ccc", "X")]),
        ("B-B-X I-B-X O", [("a bb", "B-X")]),
        ("B-O I-O O", [("a bb", "O")]),
    ],
)
@pytest.mark.parametrize("suffix", ["conll", "bio", "iob"])
def test_train_data_conll_tags(tags, entities, suffix, tmp_path):
    lines = [f"{token} {tag}" for token, tag in zip(["a", "bb", "ccc"], tags.split())]
    (record,) = read_records(write(tmp_path, f"a.{suffix}", "\n".join(lines)))
    assert record.text == "a bb ccc"
    assert surfaces(record) == entities


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["O", "X", "Y", "long-name"])), min_size=1, max_size=8))
def test_train_data_conll_chunks_are_read_back(tmp_path_factory, chunks):
    lines, expected, words = [], [], []
    for number, (length, label) in enumerate(chunks):
        tokens = [f"w{number}é{i}" for i in range(length)]
        words += tokens
        lines += [f"{t}\t{'O' if label == 'O' else ('I-' if i else 'B-') + label}" for i, t in enumerate(tokens)]
        if label != "O":
            expected.append((" ".join(tokens), label))
    path = tmp_path_factory.mktemp("conll") / "a.conll"
    path.write_text("\n".join(lines), encoding="utf8")
    (record,) = read_records(path)
    assert record.text == " ".join(words)
    assert surfaces(record) == expected


def test_train_data_conll_sentences(tmp_path):
    content = (
        "-DOCSTART- -X- O O\n\n"
        "EU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n\n"
        "\t\nGrüße\tO\nnach\tO\nBern\tB-LOC\r\n\n"
        "-DOCSTART- -X- O O\n"
        "Nobody O\n"
    )
    records = read_records(write(tmp_path, "a.conll", content))
    assert records == [
        Record("EU rejects", ((0, 2, "ORG"),)),
        Record("Grüße nach Bern", ((11, 15, "LOC"),)),
        Record("Nobody"),
    ]


def test_train_data_conll_entities_end_with_their_sentence(tmp_path):
    records = read_records(write(tmp_path, "a.conll", "a B-X\n\nb I-X\n"))
    assert [surfaces(record) for record in records] == [[("a", "X")], [("b", "X")]]


@pytest.mark.parametrize("space", ["\xa0", "\u3000", "\u2028", "\x85", "\x0c"], ids=repr)
def test_train_data_conll_tokens_keep_other_white_space(space, tmp_path):
    (record,) = read_records(write(tmp_path, "a.conll", f"10{space}000\tB-X\n{space}\tO\nBern\tB-Y\n"))
    assert record.text == f"10{space}000 {space} Bern"
    assert surfaces(record) == [(f"10{space}000", "X"), ("Bern", "Y")]


@pytest.mark.parametrize("line", ["Bern", "Bern X", "Bern B-", "Bern S-X", "Bern b-X", "Bern BX", "Bern -", "Bern 0"])
def test_train_data_malformed_conll_names_the_line(line, tmp_path):
    path = write(tmp_path, "a.conll", f"Ann B-X\n\n{line}\nBern O\n")
    with raises("S603") as caught:
        read_records(path)
    assert caught.value.fields["line"] == 3


# Datasets


def test_train_data_dataset_has_the_types_that_occur(tmp_path):
    rows = [
        {"text": "Ann", "entities": [[0, 3, "person"]]},
        {"text": " \n", "entities": []},
        {"text": "nobody", "entities": []},
        {"text": "Bern", "entities": [[0, 4, "place"]]},
    ]
    path = write(tmp_path, "towns.train.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = load_dataset(path)
    assert (dataset.name, dataset.labels) == ("towns", ("person", "place"))
    assert [record.text for record in dataset.records] == ["Ann", "nobody", "Bern"]
    assert load_dataset(path, ["place", "river"]).labels == ("place", "river")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  ", "entities": []}'])
def test_train_data_dataset_without_texts_is_refused(content, tmp_path):
    with raises("S604"):
        load_dataset(write(tmp_path, "a.jsonl", content))


# What a prompt asks

LABELS = tuple("ABCDEFGH")


@st.composite
def questions(draw):
    present = draw(st.lists(st.sampled_from(LABELS), max_size=4))
    text = "x" * 10
    record = Record(text, tuple((i, i + 1, label) for i, label in enumerate(present)))
    labels = draw(st.lists(st.sampled_from(LABELS), unique=True, max_size=8).map(lambda more: [*more, *present]))
    dataset = Dataset("a", (record,), tuple(dict.fromkeys(labels)))
    return dataset, record, draw(st.integers(1, 10)), draw(st.integers(0, 10**6))


@given(questions())
def test_train_data_ask_keeps_its_promises(question):
    dataset, record, max_labels, seed = question
    asked, entities = ask(dataset, record, random.Random(seed), max_labels)
    assert len(asked) <= max_labels
    assert len(set(asked)) == len(asked)
    assert set(asked) <= set(dataset.labels)
    assert bool(asked) == bool(dataset.labels)
    assert entities == [entity for entity in record.entities if entity[2] in asked]
    assert (asked, entities) == ask(dataset, record, random.Random(seed), max_labels)


def test_train_data_ask_varies():
    record = Record("Ann in Bern", ((0, 3, "A"), (7, 11, "B")))
    dataset = Dataset("a", (record,), LABELS)
    rng = random.Random(0)
    asked = [tuple(ask(dataset, record, rng, 8)[0]) for _ in range(400)]
    whole = sum(set(labels) == set(LABELS) for labels in asked) / len(asked)
    assert 0.4 < whole < 0.6, "all types about half the time"
    assert len({labels for labels in asked if set(labels) == set(LABELS)}) > 100, "in any order"
    few = [labels for labels in asked if set(labels) != set(LABELS)]
    assert {len(labels) for labels in few} == {1, 2, 3, 4, 5}
    assert Counter(label for labels in few for label in labels).keys() == set(LABELS)
    assert any(set(labels) == {"A"} for labels in few), "a present type without the other"


def test_train_data_ask_asks_absent_types_of_a_text_without_entities():
    record = Record("nobody")
    dataset = Dataset("a", (record,), LABELS)
    rng = random.Random(0)
    for _ in range(50):
        asked, entities = ask(dataset, record, rng, 4)
        assert 1 <= len(asked) <= 4
        assert entities == []


def test_train_data_ask_leaves_out_types_that_the_dataset_is_not_about():
    record = Record("Ann in Bern", ((0, 3, "person"), (7, 11, "place")))
    dataset = Dataset("a", (record,), ("place", "river"))
    for seed in range(50):
        asked, entities = ask(dataset, record, random.Random(seed), 4)
        assert "person" not in asked
        assert all(label == "place" for _, _, label in entities)


def test_train_data_ask_asks_the_types_of_the_text():
    """A text with types of its own is asked for all of these, in any order, and for none of the corpus's."""
    record = Record("Ann in Bern", ((0, 3, "person"), (7, 11, "town")), ("person", "town", "dog"))
    dataset = Dataset("a", (record,), LABELS)
    rng = random.Random(0)
    asked = [ask(dataset, record, rng, 3) for _ in range(60)]
    assert {tuple(sorted(labels)) for labels, _ in asked} == {("dog", "person", "town")}
    assert len({tuple(labels) for labels, _ in asked}) == 6
    assert all(entities == list(record.entities) for _, entities in asked)
    for _ in range(50):
        labels, entities = ask(dataset, record, rng, 2)
        assert len(set(labels)) == 2
        assert entities == [entity for entity in record.entities if entity[2] in labels]


# Other names of types


@given(st.data())
def test_train_data_rename_keeps_its_promises(data):
    """Each type is asked by its name or an alias of it, no two by the same, and the answer has the names asked."""
    labels = data.draw(st.lists(st.sampled_from(LABELS), unique=True))
    few = st.lists(st.sampled_from((*LABELS, "x", "y")), max_size=4)
    aliases = data.draw(st.dictionaries(st.sampled_from(LABELS), few))
    entities = [(i, i + 1, label) for i, label in enumerate(data.draw(st.lists(st.sampled_from(labels or LABELS))))]
    entities = entities if labels else []
    seed = data.draw(st.integers(0, 10**6))
    names, renamed = rename(labels, entities, aliases, random.Random(seed))
    assert len(set(names)) == len(names) == len(labels)
    assert all(name == label or name in aliases[label] for label, name in zip(labels, names))
    called = dict(zip(labels, names))
    assert renamed == [(start, end, called[label]) for start, end, label in entities]
    assert (names, renamed) == rename(labels, entities, aliases, random.Random(seed))


def test_train_data_rename_varies():
    rng = random.Random(0)
    aliases = {"person": ["human", "individual"], "place": ["person", "human"], "other": ["never"]}
    asked = Counter(tuple(rename(["person", "place", "river"], [], aliases, rng)[0]) for _ in range(1000))
    names = [Counter(labels[i] for labels in asked.elements()) for i in range(3)]
    assert set(names[0]) == {"person", "human", "individual"}
    assert 500 < names[0]["person"] < 700, "most often by its own name"
    assert set(names[1]) == {"place", "human"}
    assert set(names[2]) == {"river"}


# The schedule


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(make_tokenizer(), LinesFormat())


def make_dataset(name, n_records, labels=("person", "place"), length=5):
    words = ["Ann", "went", "to", "Bern", "again"]
    rng = random.Random(name)
    records = []
    for _ in range(n_records):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, length)))
        entities = [(i, i + 4, labels[-1]) for i in [text.find("Bern")] if i >= 0 and labels]
        records.append(
            Record(f"{name} {text}", tuple((s + len(name) + 1, e + len(name) + 1, x) for s, e, x in entities))
        )
    return Dataset(name, tuple(records), tuple(labels))


DRAW = {"n_batches": 30, "tokens_per_batch": 400, "max_length": 80, "max_labels": 4, "seed": 3}


def test_train_data_example_is_prompt_and_answer(encoder):
    example = encode_example(encoder, ["place"], f"Bern {END}", [(0, 4, "place")])
    prompt, answer = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
    assert encoder.decode(prompt)[0] == f"Types: place\nText: Bern {END}\nEntities:\n"
    assert encoder.decode(answer)[0] == " Bern | place\n"
    assert example.input_ids.count(encoder.tokenizer.eos_token_id) == 1
    assert answer[-1] == encoder.tokenizer.eos_token_id


def test_train_data_schedule_depends_on_its_arguments_alone(encoder):
    datasets = [make_dataset("one", 20), make_dataset("two", 5)]
    first = draw_batches(datasets, encoder, **DRAW)
    random.seed(99)
    assert draw_batches(datasets, encoder, **DRAW) == first
    assert draw_batches(datasets, encoder, **{**DRAW, "seed": 4}) != first
    assert draw_batches(datasets, encoder, **{**DRAW, "n_batches": 10}) == first[:10]


@pytest.mark.parametrize("n_batches", [0, 1, 7, 100])
def test_train_data_schedule_has_as_many_batches_as_asked(n_batches, encoder):
    batches = draw_batches([make_dataset("one", 20)], encoder, **{**DRAW, "n_batches": n_batches})
    assert len(batches) == n_batches
    assert all(batches)


@pytest.mark.parametrize("tokens_per_batch", [64, 200, 1000])
@pytest.mark.parametrize("max_length", [40, 60, 200])
def test_train_data_schedule_keeps_to_its_budget(tokens_per_batch, max_length, encoder):
    settings = {**DRAW, "tokens_per_batch": tokens_per_batch, "max_length": max_length}
    batches = draw_batches([make_dataset("one", 50, length=40)], encoder, **settings)
    for batch in batches:
        padded = len(batch) * max(len(example.input_ids) for example in batch)
        assert padded <= tokens_per_batch or len(batch) == 1
        assert all(len(example.input_ids) <= max_length for example in batch)
    if tokens_per_batch >= 200:
        assert max(map(len, batches)) > 1, "short examples share a batch"


def test_train_data_schedule_fills_its_batches(encoder):
    settings = {**DRAW, "tokens_per_batch": 1000, "max_length": 200}
    batches = draw_batches([make_dataset("one", 50, length=40)], encoder, **settings)
    used = sum(len(example.input_ids) for batch in batches for example in batch)
    padded = sum(len(batch) * max(len(example.input_ids) for example in batch) for batch in batches)
    assert used > 0.85 * padded, "examples of a batch are of like length"
    assert padded > 0.6 * 1000 * len(batches)


def corpora_of(batches, encoder):
    texts = [encoder.decode(e.input_ids[: e.n_prompt])[0] for batch in batches for e in batch]
    return Counter(text.split("Text: ")[1].split()[0] for text in texts)


def test_train_data_schedule_draws_corpora_by_the_root_of_their_size(encoder):
    datasets = [make_dataset("large", 400), make_dataset("small", 4)]
    drawn = corpora_of(draw_batches(datasets, encoder, **{**DRAW, "n_batches": 300}), encoder)
    assert 0.05 < drawn["small"] / sum(drawn.values()) < 0.14  # 2 to 20, where sizes are 1 to 100


def test_train_data_schedule_takes_a_share_of_general_corpora(encoder):
    """Whatever their sizes, and by the root of these among themselves."""
    datasets, general = [make_dataset("domain", 9)], [make_dataset("large", 900), make_dataset("small", 9)]
    draw = {**DRAW, "n_batches": 300}
    drawn = corpora_of(draw_batches(datasets, encoder, **draw, general=general, general_share=0.25), encoder)
    assert 0.7 < drawn["domain"] / sum(drawn.values()) < 0.8
    assert 0.05 < drawn["small"] / (drawn["small"] + drawn["large"]) < 0.14
    plain = draw_batches(datasets, encoder, **draw)
    assert draw_batches(datasets, encoder, **draw, general=general) == plain, "no share, no general corpora"
    assert draw_batches(datasets, encoder, **draw, general_share=0.25) == plain


def test_train_data_schedule_sees_every_record_before_any_again(encoder):
    records = tuple(Record(f"number{i} is here") for i in range(64))
    batches = draw_batches([Dataset("a", records, ("place",))], encoder, **{**DRAW, "n_batches": 50})
    texts = [encoder.decode(e.input_ids)[0].split("\n")[1] for batch in batches for e in batch]
    assert set(Counter(texts[:64]).values()) == {1}, "one pool is one round"
    assert len(set(texts)) == 64


def test_train_data_schedule_leaves_out_what_is_too_long(encoder):
    short, long = Record("short text"), Record("long " * 200)
    dataset = Dataset("a", (short, long), ("place",))
    drawn = corpora_of(draw_batches([dataset], encoder, **DRAW), encoder)
    assert set(drawn) == {"short"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("datasets", "max_labels"),
    [
        ([], 4),
        ([Dataset("empty", (), ("place",))], 4),
        ([make_dataset("untyped", 3, labels=())], 4),
        ([make_dataset("untyped", 3, labels=()), Dataset("empty", (), ("place",))], 4),
        ([Dataset("long", (Record("long " * 200),), ("place",))], 4),
        ([make_dataset("unasked", 3)], 0),
        ([Dataset("own", (Record("nothing is asked of it", (), ()),), ("place",))], 4),
    ],
    ids=["none", "empty", "untyped", "mixed", "long", "unasked", "own"],
)
def test_train_data_schedule_of_nothing_is_refused(datasets, max_labels, encoder):
    with raises("S606") as caught:
        draw_batches(datasets, encoder, **{**DRAW, "max_labels": max_labels})
    assert all(dataset.name in str(caught.value) for dataset in datasets)


def test_train_data_schedule_goes_on_without_the_corpora_that_cannot_be_used(encoder):
    datasets = [make_dataset("untyped", 9, labels=()), Dataset("empty", (), ("place",)), make_dataset("good", 3)]
    drawn = corpora_of(draw_batches(datasets, encoder, **DRAW), encoder)
    assert set(drawn) == {"good"}


def prompts_of(batches, encoder):
    """The types asked by each example, and its answer."""
    pairs = [(e.input_ids[: e.n_prompt], e.input_ids[e.n_prompt :]) for batch in batches for e in batch]
    texts = [(encoder.decode(prompt)[0], encoder.decode(answer)[0]) for prompt, answer in pairs]
    return [(prompt.splitlines()[0].removeprefix("Types: ").split("; "), answer) for prompt, answer in texts]


def test_train_data_schedule_uses_aliases(encoder):
    """Prompts and answers have the same names; without aliases the schedule is as it was."""
    datasets = [make_dataset("one", 20)]
    aliases = {"place": ["town", "city"], "person": ["city"]}
    batches = draw_batches(datasets, encoder, **DRAW, aliases=aliases)
    assert batches == draw_batches(datasets, encoder, **DRAW, aliases=aliases)
    prompts = prompts_of(batches, encoder)
    assert {label for labels, _ in prompts for label in labels} == {"place", "town", "city", "person"}
    assert all(len(set(labels)) == len(labels) for labels, _ in prompts)
    answered = [(line.split(" | ")[1], labels) for labels, answer in prompts for line in answer.splitlines()]
    assert {name for name, _ in answered} == {"place", "town", "city"}
    assert all(name in labels for name, labels in answered)
    assert draw_batches(datasets, encoder, **DRAW, aliases={}) == draw_batches(datasets, encoder, **DRAW)


def test_train_data_schedule_asks_the_types_of_each_text(encoder):
    records = tuple(Record(f"{animal} is here", (), (animal, "place")) for animal in ("dog", "cat", "owl"))
    batches = draw_batches([Dataset("a", records, ("place",))], encoder, **DRAW)
    for example in (example for batch in batches for example in batch):
        lines = encoder.decode(example.input_ids)[0].splitlines()
        animal = lines[1].removeprefix("Text: ").split()[0]
        assert sorted(lines[0].removeprefix("Types: ").split("; ")) == sorted([animal, "place"])
