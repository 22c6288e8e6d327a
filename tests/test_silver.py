"""Silver corpora: what is asked of a text, and what the answer says, on a WordNet of a dozen nouns and on the real one."""

import json
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import pytest

from spacy_sam.corpora import Record, load_dataset, read_records
from spacy_sam.errors import SamError
from spacy_sam.train import silver, silver_tables
from spacy_sam.train.silver import SilverRecord, make_copies, make_silver, write_silver
from spacy_sam.train.wordnet import Reader, Span, WordNet

ROOT = Path(__file__).parents[1]
REAL = Path("/usr/share/wordnet")


class Row(NamedTuple):
    """A synset of the little WordNet: its words, the synset above it, and its gloss."""

    words: str
    parent: str = ""
    gloss: str = "a thing of some kind"
    pointer: str = "@"


ROWS = {
    "entity": Row("entity"),
    "person": Row("person individual", "entity"),
    "writer": Row("writer author", "person"),
    "poet": Row("poet", "writer", 'a writer of poems; "the poet met two writers and a dog"'),
    "novelist": Row("novelist", "writer"),
    "byron": Row("Byron Lord_Byron George_Byron", "poet", "a poet who met nobody", "@i"),
    "city": Row("city metropolis", "entity"),
    "port": Row("port", "city"),
    "bergen": Row("Bergen", "port", "a port", "@i"),
    "animal": Row("animal creature", "entity"),
    "dog": Row("dog", "animal", 'a tame animal; "the dogs barked at the wolf"'),
    "hound": Row("hound", "dog"),
    "wolf": Row("wolf", "animal"),
    "cat": Row("cat", "animal"),
    "guide_dog": Row("guide_dog", "dog"),
    "vessel": Row("vessel", "entity"),
    "bark": Row("bark", "vessel"),
    "rind": Row("rind", "entity"),
    "rind2": Row("bark", "rind"),
    "mouse": Row("mouse", "animal"),
    "gadget": Row("gadget", "entity"),
    "mouse2": Row("mouse", "gadget"),
}
COUNTS = [
    "person%1:00:00:: 1 90",
    "dog%1:00:00:: 1 9",
    "city%1:00:00:: 1 9",
    "animal%1:00:00:: 1 9",
    "writer%1:00:00:: 1 5",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A `dict` folder as WordNet 3.0 has it; an offset is the number of the row."""
    path = tmp_path_factory.mktemp("dict")
    offsets = {key: f"{number:08}" for number, key in enumerate(ROWS, 1)}
    data, senses = ["  1 a licence"], {}
    for key, row in ROWS.items():
        words = row.words.split()
        pointers = f"001 {row.pointer} {offsets[row.parent]} n 0000" if row.parent else "000"
        data.append(
            f"{offsets[key]} 03 n {len(words):02x} {' '.join(f'{w} 0' for w in words)} {pointers} | {row.gloss}  "
        )
        for word in words:
            senses.setdefault(word.lower(), []).append(offsets[key])
    index = [f"{word} n {len(s)} 1 @ {len(s)} 0 {' '.join(s)}  " for word, s in senses.items()]
    path.joinpath("data.noun").write_text("\n".join(data) + "\n")
    path.joinpath("index.noun").write_text("\n".join(["  1 a licence", *index]) + "\n")
    path.joinpath("cntlist.rev").write_text("\n".join(COUNTS) + "\n")
    path.joinpath("noun.exc").write_text("mice mouse\nwolves wolf\n")
    path.joinpath("index.verb").write_text(
        "".join(f"{verb} v 1 0 1 0 00000001\n" for verb in ("meet", "bark", "live", "like"))
    )
    path.joinpath("verb.exc").write_text("met meet\n")
    path.joinpath("index.adj").write_text("two a 1 0 1 0 00000001\nwild a 1 0 1 0 00000001\n")
    return path


@pytest.fixture(scope="module")
def reader(folder) -> Reader:
    return Reader(WordNet(folder))


def types(reader: Reader, text: str) -> Dict[str, List[str]]:
    """The words found in a text, each with the types that it surely is, the narrowest first."""
    lemmas, size = reader.wordnet.synsets, reader.wordnet.size
    spans = reader.read(text).spans
    return {text[s.start : s.end]: [lemmas[t].lemmas[0] for t in sorted(s.sure, key=lambda t: size[t])] for s in spans}


def check(record: SilverRecord) -> None:
    """What holds for every record."""
    text, entities, labels = record
    assert 3 <= len(text.split()) <= 60
    assert labels
    assert len({label.lower() for label in labels}) == len(labels)
    assert {label for _, _, label in entities} <= set(labels)
    assert list(entities) == sorted(entities)
    assert all(a[1] <= b[0] for a, b in pairwise(entities))
    for start, end, _ in entities:
        assert text[start:end].strip() == text[start:end] != ""
        assert not (text[start - 1 : start] + text[start]).isalpha() or start == 0
        assert not (text[end - 1] + text[end : end + 1]).isalpha() or end == len(text)


# Reading texts


def test_silver_finds_nouns_in_all_forms(reader):
    found = types(reader, "two wolves met a guide dog and poets")
    assert found == {
        "wolves": ["wolf", "animal", "entity"],
        "guide dog": ["guide dog", "dog", "animal", "entity"],
        "poets": ["poet", "writer", "person", "entity"],
    }


def test_silver_is_sure_only_of_what_all_senses_share(reader):
    assert types(reader, "we like the mice")["mice"] == ["entity"]
    (span,) = reader.read("we like the mice").spans
    assert {reader.wordnet.synsets[t].lemmas[0] for t in span.maybe} == {"mouse", "animal", "gadget"}


def test_silver_doubts_a_noun_that_may_be_a_verb(reader):
    assert types(reader, "dogs bark in the city")["bark"] == []


def test_silver_names_are_told_by_capitals(reader):
    assert types(reader, "we met Lord Byron in Bergen") == {
        "Lord Byron": ["Byron", "poet", "writer", "person", "entity"],
        "Bergen": ["Bergen", "port", "city", "entity"],
    }
    assert types(reader, "we met Byron")["Byron"] == []  # there are other Byrons
    assert types(reader, "we met Wolf")["Wolf"] == []
    assert types(reader, "Bergen Cat met us")["Bergen"] == []


@pytest.mark.parametrize(
    ("text", "unknown", "unknown_name"),
    [
        ("The dogs barked", False, False),
        ("The dogs xyzzed", True, False),
        ("The dogs of Frobozz barked", False, True),
        ("The dogs of @frobozz barked", True, True),
    ],
)
def test_silver_notices_unknown_words(reader, text, unknown, unknown_name):
    reading = reader.read(text)
    assert (reading.unknown, reading.unknown_name) == (unknown, unknown_name)


def test_silver_keeps_to_what_it_is_told(reader):
    told = Span(0, 3, frozenset({1}), frozenset(), False)
    assert reader.read("dog and cat", [told]).spans[0] == told


# Choosing types


def draw(folder, texts, n=400, seed=0):
    return list(make_silver(folder, texts, n, seed))


def test_silver_records_hold_together(folder):
    records = draw(folder, ["The dogs met two wild cats in the city ."])
    assert len(records) == 400
    for record in records:
        check(record)


def test_silver_is_the_same_for_a_seed(folder):
    texts = ["The dogs met two wild cats in the city ."]
    assert draw(folder, texts, 50) == draw(folder, iter(texts), 50) != draw(folder, texts, 50, seed=1)


def test_silver_asks_nothing_of_doubtful_words(folder, monkeypatch):
    monkeypatch.setattr(silver, "KINDS", {"is-a": 1.0})
    monkeypatch.setattr(silver, "CALLERS", 1.0)
    labels = {label.lower() for record in draw(folder, ["the mice live in the city"], 100) for label in record.labels}
    assert labels
    assert not labels & {"animal", "animals", "creature", "creatures", "animal or creature", "creature or animal"}


def test_silver_gives_every_mention_of_a_type(folder, monkeypatch):
    monkeypatch.setattr(silver, "KINDS", {"is-a": 1.0})
    monkeypatch.setattr(silver, "CALLERS", 1.0)
    monkeypatch.setattr(silver, "LOWERED", 0.0)
    monkeypatch.setattr(silver, "RAISED", 0.0)
    sizes = set()
    for text, entities, labels in draw(folder, ["the wolf met a hound and a guide dog in the city"], 200):
        found = {text[start:end]: label for start, end, label in entities}
        if labels == ("animal",) and entities:
            assert found == dict.fromkeys(("wolf", "hound", "guide dog"), "animal")
        if {"animal", "dog"} <= set(labels) and found:
            assert found["hound"] == found["guide dog"] == "dog"  # the most specific
        sizes.add(len(found))
    assert {1, 2, 3, 4} <= sizes


def test_silver_names_only_where_there_are_names(folder, monkeypatch):
    monkeypatch.setattr(silver, "KINDS", {"names": 1.0})
    monkeypatch.setattr(silver, "TEMPLATES", ["{any:told}, {gloss}"])
    known = {word.replace("_", " ").lower() for key in ("byron", "bergen") for word in ROWS[key].words.split()}
    records = draw(folder, [], 100)
    surfaces = {text[start:end].lower() for text, entities, _ in records for start, end, _ in entities}
    assert surfaces
    assert surfaces <= known


TEXT = 'In 1999 "some fool" paid $5 million, or 20% (much), to ACME-Corp via a@b.org by 3:15 pm #sad'


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("number", ["1999", "5"]),
        ("year", ["1999"]),
        ("capitalised word", ["In"]),
        ("quotation", ["some fool"]),
        ("text in brackets", ["much"]),
        ("hyphenated word", ["ACME-Corp"]),
        ("email address", ["a@b.org"]),
        ("time of day", ["3:15 pm"]),
        ("hashtag", ["#sad"]),
        ("amount of money", ["$5 million"]),
        ("percentage", ["20%"]),
    ],
)
def test_silver_patterns_are_exact(label, expected):
    (pattern,) = (pattern for names, pattern in silver_tables.PATTERNS if label in names)
    assert [match.group() for match in pattern.finditer(TEXT)] == expected


def test_silver_patterns_are_asked(folder, monkeypatch):
    monkeypatch.setattr(silver, "KINDS", {"pattern": 1.0})
    monkeypatch.setattr(silver, "CALLERS", 1.0)
    labels = {label for record in draw(folder, [TEXT], 200) for _, _, label in record.entities}
    assert {"hashtag", "year"} <= labels
    assert any(label.startswith("word starting with") for label in labels)


@pytest.mark.parametrize("n", [1, 2])
def test_silver_fillers_are_what_they_are_called(n):
    patterns = {names[0]: pattern for names, pattern in silver_tables.PATTERNS}
    called = {
        "date": "date",
        "money": "amount of money",
        "percent": "percentage",
        "email": "email address",
        "url": "url",
    }
    called |= {"time": "time of day", "hashtag": "hashtag", "user": "user name", "year": "year", "number": "number"}
    for slot, make in silver_tables.FILLERS.items():
        for seed in range(40):
            filler = make(random.Random(n * seed))
            match = patterns[called[slot]].search(f"it was {filler} then")
            assert match is not None, filler
            assert match.group() == filler


# Errors and files


def test_silver_without_wordnet(tmp_path):
    with pytest.raises(SamError, match=r"^\[S607\]"):
        make_silver(tmp_path, [], 1, 0)


def test_silver_when_nothing_can_be_asked(folder, monkeypatch):
    monkeypatch.setattr(silver, "MAX_TRIED", 5)
    monkeypatch.setattr(silver, "WORDS", range(200, 300))
    with pytest.raises(SamError, match=r"^\[S606\]"):
        next(make_silver(folder, [], 1, 0))


def test_silver_is_read_as_written(folder, tmp_path):
    records = [*draw(folder, [], 30), SilverRecord("Zürich\u2028 is 😀", ((0, 6, "city"),), ("city", "dog"))]
    write_silver(iter(records), tmp_path / "a.jsonl")
    dataset = load_dataset(tmp_path / "a.jsonl")
    assert dataset.records == tuple(Record(*record) for record in records)
    assert set(dataset.labels) == {label for record in records for label in record.labels}


# Copies

TEXTS = ["one two", "one  two\nthree ", " ".join("a" * 60), " ".join("a" * 61), "", "four five six | ⟨seven⟩"]


def test_silver_copies_are_whole_texts_of_3_to_60_words():
    records = list(make_copies(iter(TEXTS), 7, 0))
    assert {(record.entities, record.labels) for record in records} == {((), ("text",))}
    fitting = {"one two three", TEXTS[2], TEXTS[5]}
    for i in (0, 3):  # each text once before one again
        assert {record.text for record in records[i : i + 3]} == fitting
    assert len(records) == 7


def test_silver_copies_are_the_same_for_a_seed():
    texts = [f"the number {i}" for i in range(50)]
    assert list(make_copies(texts, 20, 0)) == list(make_copies(texts, 20, 0)) != list(make_copies(texts, 20, 1))


def test_silver_copies_without_texts():
    with pytest.raises(SamError, match=r"^\[S606\].*3 to 60 words"):
        make_copies(["too short"], 1, 0)


# The script


def run_script(*args: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "scripts" / "make_base_corpora.py", *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture
def data(tmp_path) -> Path:
    """Two source corpora, a dev set and a target; what is no source's text is never read."""
    rows = {
        "sources/pets/a.train.jsonl": {
            "text": "The dogs met two wild cats in the city .",
            "entities": [[4, 8, "secret"]],
        },
        "sources/pets/b.train.jsonl": {"text": "a dog and a wolf", "entities": "not even valid"},
        "sources/pets/a.dev.jsonl": {"text": "the dev set of pets", "entities": []},
        "targets/zoo.test.jsonl": {"text": "the target of them all", "entities": []},
    }
    for name, row in rows.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n", encoding="utf8")
    return tmp_path / "data"


def test_silver_base_corpora(folder, data, tmp_path):
    written = tmp_path / "written"
    (written / "short").mkdir(parents=True)
    held_out = "".join(f"## subject {n}\ntypes: x; y\nno. [{n}|x]\n" for n in range(40))
    (written / "short" / "a.txt").write_text(held_out, encoding="utf8")
    sizes = ("--n-silver", 40, "--n-copies", 6, "--n-written", 30, "--written", written)
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        result = run_script(data, tmp_path / out / "deep", "--wordnet", folder, *sizes, "--seed", seed)
        assert result.returncode == 0, result.stdout + result.stderr
        assert {("copy.jsonl", "6"), ("silver.jsonl", "40"), ("written.jsonl", "30")} <= {
            tuple(line.split()[:2]) for line in result.stdout.splitlines()
        }
    for name in ("copy.jsonl", "silver.jsonl", "written.jsonl"):
        first, same, other = ((tmp_path / out / "deep" / name).read_bytes() for out in "abc")
        assert first == same != other
    copies, records, drawn, dev = (
        read_records(tmp_path / "a" / "deep" / f"{name}.jsonl") for name in ("copy", "silver", "written", "written_dev")
    )
    seen = {number for record in drawn for number in re.findall(r"\d+", record.text)}
    assert seen.isdisjoint(record.text.removeprefix("no. ") for record in dev)
    assert 0 < len(dev) < 10
    assert {record.labels for record in dev} == {("x", "y")}
    sources = {"The dogs met two wild cats in the city .", "a dog and a wolf"}
    assert {record.text for record in copies} == sources
    assert {record.labels for record in copies} == {("text",)}
    texts = {record.text for record in records}
    assert any(text.startswith(tuple(sources)) for text in texts)
    assert not any("dev set" in text or "target" in text for text in texts)
    labels = {label for record in records for label in record.labels or ()}
    assert "secret" not in labels
    for record in records:
        check(SilverRecord(record.text, record.entities, record.labels or ()))


def test_silver_base_corpora_say_what_is_missing(folder, data, tmp_path):
    result = run_script(data, tmp_path / "out", "--wordnet", tmp_path / "none")
    assert result.returncode == 1
    assert "[S607]" in result.stdout
    assert "apt-get install wordnet-base" in result.stdout
    assert not (tmp_path / "out").exists()
    result = run_script(tmp_path / "nowhere", tmp_path / "out", "--wordnet", folder)
    assert result.returncode == 1
    assert "[S602]" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.skipif(not (REAL / "data.noun").is_file(), reason="Debian's wordnet-base is not installed")
def test_silver_of_the_real_wordnet():
    records = list(make_silver(REAL, ["i need a flight from boston to denver"], 2000, 0))
    for record in records:
        check(record)
    n_entities = [len(record.entities) for record in records]
    assert 1 <= sum(n_entities) / len(records) <= 3
    assert 0.1 <= n_entities.count(0) / len(records) <= 0.2
    assert len({label for record in records for label in record.labels}) > 1000
