"""The written corpus: its format is read exactly, and what is drawn from it never contradicts what was annotated."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.corpora import Record, read_records
from spacy_sam.errors import SamError
from spacy_sam.train.written import Block, is_held_out, make_written, read_blocks

ROOT = Path(__file__).parents[1]
ASSETS = sorted((ROOT / "assets" / "written").glob("*/*.txt"))
TEXT = """\
## harbours | log
types: ship; port;  cargo
The [Anna Maria|ship] left [Bergen|port] with [salt|cargo].

Nobody waved.
## tea | chat
types: sort of tea
more [oolong|sort of tea]
"""
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="[]|\r\n", exclude_categories=("Z", "C")), min_size=1)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf8")
    return path


def test_written_blocks_are_read(tmp_path):
    harbours, tea = read_blocks(write(tmp_path / "a.txt", TEXT))
    assert (harbours.subject, harbours.types) == ("harbours | log", ("ship", "port", "cargo"))
    text = "The Anna Maria left Bergen with salt."
    assert harbours.records[0] == Record(
        text, ((4, 14, "ship"), (20, 26, "port"), (32, 36, "cargo")), ("ship", "port", "cargo")
    )
    assert harbours.records[1] == Record("Nobody waved.", (), harbours.types)
    assert tea.records == (Record("more oolong", ((5, 11, "sort of tea"),), ("sort of tea",)),)


@given(st.lists(st.tuples(WORDS, st.booleans()), min_size=1))
def test_written_marks_are_read_back(tmp_path_factory, words):
    line = " ".join(f"[{word}|x]" if marked else word for word, marked in words)
    if line.startswith(("## ", "types:")):
        return
    path = write(tmp_path_factory.mktemp("written") / "a.txt", f"types: x\n{line}\n")
    (block,) = read_blocks(path)
    (record,) = block.records
    assert record.text == " ".join(word for word, _ in words)
    assert [record.text[start:end] for start, end, _ in record.entities] == [word for word, marked in words if marked]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("## a\na text\n", 2, "'types: ...'"),
        ("types: x; y; x\n", 1, "named twice"),
        ("types: x\n\n[a|y]\n", 3, "'y' is not in the block's list"),
        ("types: x\n[ a|x]\n", 2, "begins or ends with a space"),
        ("types: x\n[|x]\n", 2, "empty"),
        ("types: x\na [b\n", 2, "bracket or bar"),
        ("types: x\n## b\n[a|x]\n", 3, "'types: ...'"),  # a new block has no types yet
    ],
)
def test_written_errors_name_the_line(text, line, problem, tmp_path):
    with pytest.raises(SamError, match=re.escape(problem)) as error:
        read_blocks(write(tmp_path / "bad.txt", text))
    assert error.value.code == "S603"
    assert f"bad.txt, line {line}:" in str(error.value)


def test_written_missing_file_is_refused(tmp_path):
    with pytest.raises(SamError, match="S602"):
        read_blocks(tmp_path / "none.txt")


def make_blocks(n_blocks: int = 3, n_records: int = 5) -> list:
    """Blocks of sentences like "S1-0 has a1 b1": of the types a-1 and b-1; c-1 is never there."""
    blocks = []
    for number in range(n_blocks):
        types = (f"a-{number}", f"b-{number}", f"c-{number}")
        texts = [f"S{number}-{place} has a{number} b{number}" for place in range(n_records)]
        at = len(f"S{number}-0 has ")
        entities = ((at, at + 2, types[0]), (at + 3, at + 5, types[1]))
        blocks.append(Block(f"subject {number} | style", types, tuple(Record(t, entities, types) for t in texts)))
    return blocks


def test_written_records_never_contradict_the_annotation():
    kinds = set()
    for record in make_written(make_blocks(), 3000, 0):
        labels = {label.lower() for label in record.labels}
        assert len(labels) == len(record.labels) > 0
        for number in {int(n) for n in re.findall(r"s(\d)-", record.text.lower())}:
            for letter in "ab":
                places = [(m.start(), m.end()) for m in re.finditer(f"{letter}{number}", record.text.lower())]
                asked = f"{letter}-{number}" in labels
                found = [(s, e) for s, e, label in record.entities if label.lower() == f"{letter}-{number}"]
                assert found == (places if asked else [])
                kinds.add((asked, bool(found)))
            assert not [e for e in record.entities if e[2].lower().startswith("c-")]
        assert len({n for n in re.findall(r"s(\d)-", record.text.lower())}) == 1  # sentences of one block only
        assert list(record.entities) == sorted(record.entities)
        assert {label for *_, label in record.entities} <= set(record.labels)
    assert kinds == {(True, True), (False, False)}


def test_written_records_vary_in_what_is_asked():
    records = list(make_written(make_blocks(), 3000, 0))
    n = len(records)
    types = {n: {f"{letter}-{n}" for letter in "abc"} for n in "012"}
    own = [types[re.findall(r"s(\d)-", record.text.lower())[0]] for record in records]
    asked = [{label.lower() for label in record.labels} for record in records]
    assert 0.35 < sum(mine <= labels for mine, labels in zip(own, asked)) / n < 0.6
    assert 0.4 < sum(bool(labels - mine) for mine, labels in zip(own, asked)) / n < 0.9  # types of other blocks
    assert 0.1 < sum(not record.entities for record in records) / n < 0.25
    assert 0.08 < sum(record.text.islower() for record in records) / n < 0.16
    assert {record.text.lower().count("has") for record in records} == {1, 2, 3}
    assert any(label.isupper() for record in records for label in record.labels)


def test_written_records_use_every_sentence_before_one_again():
    seen = [name for r in make_written(make_blocks(2, 4), 100, 1) for name in re.findall(r"s\d-\d", r.text.lower())]
    assert len(set(seen[:8])) == len(set(seen[8:16])) == 8


def test_written_same_seed_same_records():
    first, same, other = (list(make_written(make_blocks(), 50, seed)) for seed in (3, 3, 4))
    assert first == same != other


def test_written_nothing_to_draw_from_is_refused():
    with pytest.raises(SamError, match="S606"):
        make_written([], 1, 0)


def test_written_held_out_subjects_are_held_out_in_all_styles():
    blocks = [Block(f"subject {number} | {style}", (), ()) for number in range(400) for style in ("chat", "novel")]
    held_out = [is_held_out(block) for block in blocks]
    assert held_out[::2] == held_out[1::2]
    assert 8 <= sum(held_out[::2]) <= 32


@pytest.mark.parametrize("path", ASSETS, ids=lambda path: path.stem)
def test_written_corpus_of_the_project(path):
    for block in read_blocks(path):
        assert len(block.records) >= 10
        assert all(record.entities == tuple(sorted(record.entities)) for record in block.records)
        used = {label for record in block.records for *_, label in record.entities}
        assert len(used) >= 2


# The script


def run_script(*args: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "scripts" / "make_base_corpora.py", *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=280)


def test_written_base_corpora(tmp_path):
    """Drawn by a seed, read as written, and without the held-out subjects, which are the dev set."""
    folder = tmp_path / "written" / "short"
    folder.mkdir(parents=True)
    blocks = "".join(f"## subject {n}\ntypes: x; y\nno. [{n}|x]\n" for n in range(40))
    write(folder / "a.txt", blocks)
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--n-records", 30, "--written", folder.parent, "--seed", seed)
        result = run_script(tmp_path / out / "deep", *options)
        assert result.returncode == 0, result.stdout + result.stderr
        assert ("written.jsonl", "30") in {tuple(line.split()[:2]) for line in result.stdout.splitlines()}
    first, same, other = ((tmp_path / out / "deep" / "written.jsonl").read_bytes() for out in "abc")
    assert first == same != other
    drawn, dev = (read_records(tmp_path / "a" / "deep" / f"{name}.jsonl") for name in ("written", "written_dev"))
    seen = {number for record in drawn for number in re.findall(r"\d+", record.text)}
    assert seen.isdisjoint(record.text.removeprefix("no. ") for record in dev)
    assert 0 < len(dev) < 10
    assert {record.labels for record in dev} == {("x", "y")}


def test_written_base_corpora_say_what_is_wrong(tmp_path):
    result = run_script(tmp_path / "out", "--written", tmp_path / "none")
    assert result.returncode == 1
    assert "[S606]" in result.stdout
    folder = tmp_path / "written" / "short"
    folder.mkdir(parents=True)
    write(folder / "a.txt", "types: x\n[one|y]\n")
    result = run_script(tmp_path / "out", "--written", folder.parent)
    assert result.returncode == 1
    assert "line 2" in result.stdout
    assert not (tmp_path / "out").exists()
