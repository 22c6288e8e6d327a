"""Inputs of `sam apply`: shards, what is read from them, samples."""

import gzip
import json
import os
from pathlib import Path
from typing import Any, Dict, List

import pytest
import spacy
from hypothesis import given
from hypothesis import strategies as st
from spacy.tokens import DocBin

import spacy_sam.scale.sample
from spacy_sam.errors import SamError
from spacy_sam.scale.readers import Item, Problem, Reader, UnreadableError
from spacy_sam.scale.sample import draw_texts
from spacy_sam.scale.shards import Shard, find_shards

ROWS: List[Dict[str, Any]] = [{"text": "Anna met Omar.", "id": 1}, {"text": "Zoë 🎉 left.", "id": None}, {"text": ""}]


def jsonl(rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode("utf8") + b"\n" for row in rows)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(path: Path, out: str = "/nowhere", **settings: Any) -> List[Any]:
    (shard,) = find_shards([path], Path(out), **settings)
    return list(Reader(shard))


def rows_of(items: List[Any]) -> List[Dict[str, Any]]:
    return [{"text": item.text, **item.fields} for item in items]


# Which shards there are


def test_apply_folder_to_shards(tmp_path):
    for name in ("b.jsonl", "a/b.jsonl.gz", "a/c.spacy", "d.parquet", "x.txt", "a/y.txt", "notes.md", ".hidden.jsonl"):
        write(tmp_path / "corpus" / name, b"x")
    write(tmp_path / "corpus" / "out" / "z.jsonl", b"x")
    shards = find_shards([tmp_path / "corpus"], tmp_path / "corpus" / "out")
    assert [(shard.key, shard.kind) for shard in shards] == [
        ("a/b", "jsonl"),
        ("a/c", "spacy"),
        ("b", "jsonl"),
        ("corpus.txt.00000", "files"),
        ("d", "parquet"),
    ]
    assert shards[3].files == ("a/y.txt", "x.txt")


def test_apply_txt_by_name_and_in_folders(tmp_path):
    """Lines if it is named, a whole text in a folder; `txt` says otherwise."""
    path = write(tmp_path / "t" / "a.txt", b"One.\r\n\nTwo.")
    assert [item.text for item in read(path)] == ["One.", "Two."]
    assert rows_of(read(path.parent)) == [{"text": "One.\r\n\nTwo.", "file": "a.txt"}]
    assert [item.text for item in read(path.parent, txt="lines")] == ["One.", "Two."]
    assert [item.text for item in read(path, txt="files")] == ["One.\r\n\nTwo."]


def test_apply_many_text_files_are_packed(tmp_path, monkeypatch):
    monkeypatch.setattr("spacy_sam.scale.shards.FILES_PER_SHARD", 2)
    for number in range(5):
        write(tmp_path / "t" / f"{number}.txt", b"Anna")
    assert [shard.files for shard in find_shards([tmp_path / "t"], tmp_path / "out")] == [
        ("0.txt", "1.txt"),
        ("2.txt", "3.txt"),
        ("4.txt",),
    ]


def test_apply_patterns(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "[x].jsonl"):
        write(tmp_path / name, b"")
    assert [s.key for s in find_shards([tmp_path / "?.jsonl"], tmp_path / "out")] == ["a", "b"]
    assert [s.key for s in find_shards([tmp_path / "[x].jsonl", tmp_path / "a.jsonl"], tmp_path / "out")] == [
        "[x]",
        "a",
    ]
    assert [s.key for s in find_shards([tmp_path / "a.jsonl", tmp_path / "a.jsonl"], tmp_path / "out")] == ["a"]


@pytest.mark.parametrize("name", ["nothing.jsonl", "folder", "notes.md", "*.txt"])
def test_apply_nothing_to_annotate(tmp_path, name):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "notes.md", b"x")
    with pytest.raises(SamError, match=r"^\[S810\]"):
        find_shards([tmp_path / name], tmp_path / "out")


def test_apply_two_inputs_of_one_name(tmp_path):
    write(tmp_path / "a" / "dev.jsonl", b"")
    write(tmp_path / "b" / "dev.jsonl", b"")
    with pytest.raises(SamError, match=r"^\[S812\]"):
        find_shards([tmp_path / "a" / "dev.jsonl", tmp_path / "b" / "dev.jsonl"], tmp_path / "out")
    keys = [shard.key for shard in find_shards([tmp_path], tmp_path / "out")]
    assert keys == ["a/dev", "b/dev"]


# Parts of files


@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"").replace(b"\xef", b"")), max_size=12),
    st.integers(1, 40),
    st.booleans(),
)
def test_apply_parts_have_each_line_once(tmp_path_factory, lines, size, ends):
    """The parts of a file, read one after the other, are the file."""
    path = tmp_path_factory.mktemp("parts") / "big.txt"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    shards = find_shards([path], path.parent / "out", shard_size=size)
    whole = [line for _, line in Reader(Shard("big", str(path), "txt"))._lines()]
    parts = [list(Reader(shard)._lines()) for shard in shards]
    assert [line for part in parts for _, line in part] == whole
    firsts = [Reader(shard).first_line() for shard in shards]
    numbers = [first + number - 1 for first, part in zip(firsts, parts) for number, _ in part]
    assert numbers == list(range(1, len(whole) + 1))
    assert [shard.digest() for shard in shards] == [digest(b"".join(line for _, line in part), path) for part in parts]


def digest(data: bytes, beside: Path) -> str:
    other = beside.with_name("same.txt")
    other.write_bytes(data)
    return Shard("same", str(other), "txt").digest()


def test_apply_only_large_plain_files_are_divided(tmp_path):
    data = jsonl({"text": f"Anna {n}"} for n in range(100))
    write(tmp_path / "c" / "a.jsonl", data)
    write(tmp_path / "c" / "b.jsonl.gz", gzip.compress(data))
    write(tmp_path / "c" / "small.jsonl", data[:20])
    keys = [shard.key for shard in find_shards([tmp_path / "c"], tmp_path / "out", shard_size=1000)]
    assert keys == ["a.00000", "a.00001", "b", "small"]


# What is read


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_apply_reads_jsonl(tmp_path, suffix):
    data = b"\xef\xbb\xbf" + jsonl(ROWS[:2]) + b"\n" + jsonl(ROWS[2:])
    if suffix.endswith("gz"):
        data = gzip.compress(data[:30]) + gzip.compress(data[30:])
    elif suffix.endswith("zst"):
        zstandard = pytest.importorskip("zstandard")
        data = zstandard.compress(data[:30]) + zstandard.compress(data[30:])
    items = read(write(tmp_path / f"a{suffix}", data))
    assert rows_of(items) == ROWS
    assert [item.place for item in items] == [1, 2, 4]


def test_apply_reads_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["Anna", None], "id": [1, 2]}), tmp_path / "a.parquet")
    item, problem = read(tmp_path / "a.parquet")
    assert (item.text, item.fields, problem.place) == ("Anna", {"id": 1}, 2)
    with pytest.raises(UnreadableError, match="no column 'body'; there are text, id"):
        list(Reader(Shard("a", str(tmp_path / "a.parquet"), "parquet"), text_field="body"))


def test_apply_reads_docbin(tmp_path):
    nlp = spacy.blank("en")
    doc = nlp("Anna met Omar.")
    doc.set_ents([doc.char_span(0, 4, label="person")])
    DocBin(docs=[doc], store_user_data=True).to_disk(tmp_path / "a.spacy")
    (item,) = Reader(Shard("a", str(tmp_path / "a.spacy"), "spacy"), vocab=nlp.vocab)
    assert (item.text, item.doc.ents[0].label_) == ("Anna met Omar.", "person")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{broken", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x"}', "no 'text'"),
        (b'{"text": 5}', "not a string"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_apply_malformed_lines(tmp_path, line, problem):
    items = read(write(tmp_path / "a.jsonl", jsonl(ROWS[:1]) + line + b"\n" + jsonl(ROWS[1:])))
    assert [type(item) for item in items] == [Item, Problem, Item, Item]
    assert (items[1].place, problem in items[1].problem) == (2, True)


def test_apply_text_that_is_not_utf8(tmp_path):
    write(tmp_path / "t" / "a.txt", "Zoë".encode("latin1"))
    write(tmp_path / "t" / "b.txt", "Zoë".encode())
    problem, item = read(tmp_path / "t")
    assert (problem.place, item.text) == ("a.txt", "Zoë")
    problem, item = read(write(tmp_path / "c.txt", b"Zo\xeb\nZo\xc3\xab\n"))
    assert (problem.place, item.text) == (1, "Zoë")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".spacy", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_apply_damaged_files(tmp_path, suffix, damage):
    data = jsonl({"text": f"Anna {n} {os.urandom(20).hex()}"} for n in range(500))
    if suffix.endswith("gz"):
        data = gzip.compress(data)
    elif suffix.endswith("zst"):
        data = pytest.importorskip("zstandard").compress(data)
    elif suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = write(tmp_path / f"a{suffix}", data[: len(data) // 2] if damage == "cut" else b"something else")
    with pytest.raises(UnreadableError):
        list(Reader(find_shards([path], tmp_path / "out")[0], vocab=spacy.blank("xx").vocab))


# Samples


def corpus(folder: Path, n_shards: int, n_docs: int) -> List[Shard]:
    for shard in range(n_shards):
        write(folder / f"{shard}.jsonl", jsonl({"text": f"text {shard} {n:03d}"} for n in range(n_docs)))
    return find_shards([folder], folder / "out")


@pytest.mark.parametrize("whole", [True, False])
def test_apply_sample_is_from_all_over(tmp_path, monkeypatch, whole):
    """From the heads, middles and ends of all shards; the seed decides; no text twice."""
    monkeypatch.setattr(spacy_sam.scale.sample, "WHOLE", 10**9 if whole else 0)
    shards = corpus(tmp_path, 4, 200)
    texts = draw_texts(shards, 80, 1)
    assert len(set(texts)) == len(texts) == 80
    assert texts == draw_texts(shards, 80, 1)
    assert set(texts) != set(draw_texts(shards, 80, 2))
    places = [(int(text.split()[1]), int(text.split()[2]) // 50) for text in texts]
    assert len(set(places)) == 16
    assert len(draw_texts(shards, 5, 1)) == 5


def test_apply_sample_of_a_small_corpus_is_all_of_it(tmp_path):
    shards = corpus(tmp_path, 2, 3)
    write(tmp_path / "0.jsonl", b"broken\n" + jsonl([{"text": " "}, {"text": "x" * 20_000}]))
    write(tmp_path / "b.jsonl.gz", b"no gzip")
    texts = draw_texts([*shards, *find_shards([tmp_path / "b.jsonl.gz"], tmp_path / "out")], 100, 0)
    assert sorted(texts) == ["text 1 000", "text 1 001", "text 1 002", "x" * 10_000]


def test_apply_sample_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(spacy_sam.scale.sample, "WHOLE", 0)
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl({"text": f"gz {n}"} for n in range(50))))
    write(tmp_path / "t.txt", b"\n".join(b"line %d" % n for n in range(50)))
    for number in range(50):
        write(tmp_path / "f" / f"{number}.txt", b"file %d" % number)
    shards = find_shards([tmp_path / "a.jsonl.gz", tmp_path / "t.txt", tmp_path / "f"], tmp_path / "out")
    texts = draw_texts(shards, 60, 0)
    assert len(set(texts)) == len(texts)
    assert {text.split()[0] for text in texts} == {"gz", "line", "file"}
