"""Outputs of `sam apply`: each format as its tool reads it, with exact offsets."""

import io
import json
from typing import Any, List

import pytest
import spacy
from spacy.tokens import DocBin

from spacy_sam.errors import SamError
from spacy_sam.scale.writers import FORMATS, Annotated, check_format

TEXT = "Zoë 🎉 met Omar Haddad, in Kyōto."
ENTITIES = [(0, 3, "person", 0.9), (10, 21, "person", 0.5), (26, 31, "place", None)]
SURFACES = ["Zoë", "Omar Haddad", "Kyōto"]
FIELDS = {
    "id": 7,
    "meta": {"source": "x"},
    "half": "\ud83d",
    "_task_hash": 1,
    "answer": "accept",
    "entities": [[0, 1, "old"]],
}


def annotated() -> List[Annotated]:
    nlp = spacy.blank("en")
    doc = nlp(TEXT)
    doc.set_ents([doc.char_span(start, end, label=label) for start, end, label, _ in ENTITIES])
    tokens = [(token.idx, token.idx + len(token), bool(token.whitespace_)) for token in doc]
    failed = Annotated(2, "Bad.", {}, error="it fell over", make_doc=lambda: nlp.make_doc("Bad."))
    return [Annotated(1, TEXT, FIELDS, ENTITIES, tokens, None, lambda: doc), failed]


def written(name: str, items: Any = None) -> bytes:
    file = io.BytesIO()
    writer = FORMATS[name](file, "f1n9e8")
    for item in annotated() if items is None else items:
        writer.write(item)
    writer.close()
    return file.getvalue()


def rows(name: str) -> List[Any]:
    return [json.loads(line) for line in written(name).splitlines()]


def test_apply_jsonl():
    row, failed = rows("jsonl")
    assert [(row["text"][start:end], label, score) for start, end, label, score in row["entities"]] == [
        ("Zoë", "person", 0.9),
        ("Omar Haddad", "person", 0.5),
        ("Kyōto", "place", None),
    ]
    assert (row["id"], row["meta"], row["half"], row["plan"]) == (7, {"source": "x"}, "\ud83d", "f1n9e8")
    assert failed == {"text": "Bad.", "entities": [], "plan": "f1n9e8", "error": "it fell over"}


def test_apply_prodigy():
    row, failed = rows("prodigy")
    assert "".join(token["text"] + " " * token["ws"] for token in row["tokens"]) == TEXT
    assert [token["id"] for token in row["tokens"]] == list(range(len(row["tokens"])))
    for span, surface in zip(row["spans"], SURFACES, strict=True):
        assert TEXT[span["start"] : span["end"]] == surface
        assert row["tokens"][span["token_start"]]["start"] == span["start"]
        assert row["tokens"][span["token_end"]]["end"] == span["end"]
    assert [span.get("score") for span in row["spans"]] == [0.9, 0.5, None]
    assert row["meta"] == {"source": "x", "plan": "f1n9e8"}
    assert row["id"] == 7
    assert {"_task_hash", "answer"} & row.keys() == set()
    assert failed == {"text": "Bad.", "meta": {"plan": "f1n9e8", "error": "it fell over"}, "spans": []}


def test_apply_label_studio():
    task, failed = json.loads(written("label-studio"))
    assert (task["data"]["text"], task["data"]["id"]) == (TEXT, 7)
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "sam_ner f1n9e8"
    assert prediction["score"] == 0.7
    assert len({region["id"] for region in prediction["result"]}) == 3
    for region, surface, (start, end, label, score) in zip(prediction["result"], SURFACES, ENTITIES, strict=True):
        assert region["value"] == {"start": start, "end": end, "text": surface, "labels": [label]}
        assert (region["from_name"], region["to_name"], region["type"]) == ("label", "text", "labels")
        assert region.get("score") == score
    assert failed == {"data": {"text": "Bad.", "error": "it fell over"}, "predictions": []}
    assert json.loads(written("label-studio", [])) == []
    assert len(written("label-studio").splitlines()) == 4


def test_apply_doccano():
    row, failed = rows("doccano")
    assert [(row["text"][start:end], label) for start, end, label in row["label"]] == [
        ("Zoë", "person"),
        ("Omar Haddad", "person"),
        ("Kyōto", "place"),
    ]
    assert (row["id"], row["plan"], failed["label"], failed["error"]) == (7, "f1n9e8", [], "it fell over")


def test_apply_docbin():
    docs = list(DocBin(store_user_data=True).from_bytes(written("spacy")).get_docs(spacy.blank("en").vocab))
    assert [doc.text for doc in docs] == [TEXT, "Bad."]
    assert [(ent.text, ent.label_) for ent in docs[0].ents] == list(zip(SURFACES, ["person", "person", "place"]))
    assert docs[0].user_data["plan"] == "f1n9e8"
    assert json.loads(docs[0].user_data["fields"]) == FIELDS
    assert docs[1].user_data["error"] == "it fell over"


def test_apply_parquet():
    parquet = pytest.importorskip("pyarrow.parquet")
    row, failed = parquet.read_table(io.BytesIO(written("parquet"))).to_pylist()
    assert [tuple(entity.values()) for entity in row["entities"]] == ENTITIES
    assert (row["text"], json.loads(row["fields"])["id"], row["error"], failed["error"]) == (
        TEXT,
        7,
        None,
        "it fell over",
    )


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_apply_formats_are_the_same_each_time(name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    assert written(name) == written(name)


def test_apply_unknown_format(monkeypatch):
    with pytest.raises(SamError, match=r"^\[S802\].*label-studio"):
        check_format("brat")
    monkeypatch.setattr("spacy_sam.scale.readers.import_module", lambda name: __import__("there_is_no_such_module"))
    with pytest.raises(SamError, match=r"^\[S814\].*spacy-sam\[parquet\]"):
        check_format("parquet")
