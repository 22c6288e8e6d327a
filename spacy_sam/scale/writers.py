"""Annotated documents to files: our own JSONL, DocBin, Prodigy, Label Studio, doccano, Parquet.

All offsets are in characters (Unicode code points), which is what Python and each of these tools count.
"""

import json
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

from .readers import need

Entity = Tuple[int, int, str, Optional[float]]
DIGITS = 4


@dataclass
class Annotated:
    """A document as it is written.

    entities: (start, end, label, score); the score is None for what another component found.
    tokens: (start, end, whitespace follows), in characters; None if it could not be tokenised.
    error: Why it was not annotated.
    make_doc: Gives the spaCy Doc.
    """

    place: Union[int, str]
    text: str
    fields: Dict[str, Any] = field(default_factory=dict)
    entities: Sequence[Entity] = ()
    tokens: Optional[Sequence[Tuple[int, int, bool]]] = None
    error: Optional[str] = None
    make_doc: Optional[Callable[[], Any]] = None


class Writer:
    """Writes one shard's documents to a file."""

    suffix = ""
    package: Optional[Tuple[str, str, str]] = None  # module, package, extra

    def __init__(self, file: BinaryIO, plan: str) -> None:
        """file: Open for writing. plan: The plan's fingerprint."""
        self.file = file
        self.plan = plan

    def write(self, item: Annotated) -> None:
        """Write one document."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left. The file stays open."""


class JsonlWriter(Writer):
    """`{"text", "entities": [[start, end, label, score]], "plan"}` with the fields that the document came with."""

    suffix = ".jsonl"

    def write(self, item: Annotated) -> None:
        self.file.write(dumps(self.row(item)) + b"\n")

    def row(self, item: Annotated) -> Dict[str, Any]:
        error = {"error": item.error} if item.error else {}
        rest = without(item.fields, "text", "entities", "plan", "error")
        return {"text": item.text, "entities": [list(e) for e in item.entities], **rest, "plan": self.plan, **error}


class ProdigyWriter(JsonlWriter):
    """Prodigy's tasks with `tokens` and `spans`, for `ner.manual` and its like. `token_end` is the last token itself."""

    def row(self, item: Annotated) -> Dict[str, Any]:
        given = item.fields.get("meta")
        meta = dict(given) if isinstance(given, dict) else {} if given is None else {"meta": given}
        meta["plan"] = self.plan
        if item.error:
            meta["error"] = item.error
        kept = without(item.fields, "text", "tokens", "spans", "meta", "answer", "_input_hash", "_task_hash")
        row = {"text": item.text, "meta": meta, **kept}
        if item.tokens is not None:
            row["tokens"] = [
                {"text": item.text[start:end], "start": start, "end": end, "id": number, "ws": space}
                for number, (start, end, space) in enumerate(item.tokens)
            ]
        row["spans"] = [self._span(item, entity) for entity in item.entities]
        return row

    def _span(self, item: Annotated, entity: Entity) -> Dict[str, Any]:
        start, end, label, score = entity
        span: Dict[str, Any] = {"start": start, "end": end, "label": label}
        tokens = item.tokens or ()
        span["token_start"] = next(i for i, token in enumerate(tokens) if token[0] == start)
        span["token_end"] = next(i for i, token in enumerate(tokens) if token[1] == end)
        if score is not None:
            span.update(score=score, source="sam_ner")
        return span


class DoccanoWriter(JsonlWriter):
    """doccano's JSONL for sequence labelling: `{"text", "label": [[start, end, label]]}`; the rest becomes its metadata."""

    def row(self, item: Annotated) -> Dict[str, Any]:
        error = {"error": item.error} if item.error else {}
        rest = without(item.fields, "text", "label", "entities", "relations", "plan", "error")
        return {
            "text": item.text,
            "label": [[s, e, label] for s, e, label, _ in item.entities],
            **rest,
            "plan": self.plan,
            **error,
        }


class LabelStudioWriter(Writer):
    """Label Studio's tasks with pre-annotations, a JSON list with a task a line.

    For a labelling config of `<Labels name="label" toName="text">` and `<Text name="text" value="$text"/>`.
    """

    suffix = ".json"

    def __init__(self, file: BinaryIO, plan: str) -> None:
        super().__init__(file, plan)
        self._before = b"[\n"

    def write(self, item: Annotated) -> None:
        error = {"error": item.error} if item.error else {}
        data = {"text": item.text, **without(item.fields, "text", "error"), **error}
        prediction: Dict[str, Any] = {"model_version": f"sam_ner {self.plan}"}
        scores = [score for _, _, _, score in item.entities if score is not None]
        if scores:
            prediction["score"] = round(sum(scores) / len(scores), DIGITS)
        prediction["result"] = [self._region(item.text, n, entity) for n, entity in enumerate(item.entities)]
        self.file.write(self._before + dumps({"data": data, "predictions": [] if item.error else [prediction]}))
        self._before = b",\n"

    def _region(self, text: str, number: int, entity: Entity) -> Dict[str, Any]:
        start, end, label, score = entity
        value = {"start": start, "end": end, "text": text[start:end], "labels": [label]}
        region = {"id": f"e{number}", "from_name": "label", "to_name": "text", "type": "labels", "value": value}
        return region if score is None else {**region, "score": score}

    def close(self) -> None:
        self.file.write(b"[]\n" if self._before == b"[\n" else b"\n]\n")


class DocBinWriter(Writer):
    """A DocBin with user data: `plan`, `fields` (what the document came with, as JSON) and `error`."""

    suffix = ".spacy"

    def __init__(self, file: BinaryIO, plan: str) -> None:
        from spacy.tokens import DocBin

        super().__init__(file, plan)
        self._docs = DocBin(store_user_data=True)

    def write(self, item: Annotated) -> None:
        assert item.make_doc is not None
        doc = item.make_doc()
        doc.user_data["plan"] = self.plan
        if item.fields:
            doc.user_data["fields"] = dumps(item.fields).decode("utf8")
        if item.error:
            doc.user_data["error"] = item.error
        self._docs.add(doc)

    def close(self) -> None:
        self.file.write(self._docs.to_bytes())


class ParquetWriter(Writer):
    """Columns `text`, `entities` (a list of start, end, label, score), `fields` (JSON), `plan` and `error`."""

    suffix = ".parquet"
    package = ("pyarrow.parquet", "pyarrow", "parquet")
    ROWS = 4096

    def __init__(self, file: BinaryIO, plan: str) -> None:
        super().__init__(file, plan)
        self._arrow = need("pyarrow", "pyarrow", "parquet", ParquetWriter.suffix)
        parquet = need("pyarrow.parquet", "pyarrow", "parquet", ParquetWriter.suffix)
        pa = self._arrow
        entity = pa.struct(
            [("start", pa.int64()), ("end", pa.int64()), ("label", pa.string()), ("score", pa.float64())]
        )
        columns = [("text", pa.string()), ("entities", pa.list_(entity))]
        self._schema = pa.schema([*columns, *((name, pa.string()) for name in ("fields", "plan", "error"))])
        self._table = parquet.ParquetWriter(file, self._schema)
        self._rows: List[Dict[str, Any]] = []

    def write(self, item: Annotated) -> None:
        entities = [dict(zip(("start", "end", "label", "score"), entity)) for entity in item.entities]
        fields = dumps(item.fields).decode("utf8")
        self._rows.append(
            {"text": item.text, "entities": entities, "fields": fields, "plan": self.plan, "error": item.error}
        )
        if len(self._rows) == self.ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._table.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._table.close()


FORMATS: Dict[str, Type[Writer]] = {
    "jsonl": JsonlWriter,
    "spacy": DocBinWriter,
    "prodigy": ProdigyWriter,
    "label-studio": LabelStudioWriter,
    "doccano": DoccanoWriter,
    "parquet": ParquetWriter,
}


def check_format(name: str) -> None:
    """RAISES: SamError S802 for an unknown format, S814 if its package is not there."""
    from ..errors import SamError

    if name not in FORMATS:
        raise SamError("S802", problem=f"Unknown --format '{name}'. Use one of {', '.join(FORMATS)}.")
    package = FORMATS[name].package
    if package:
        need(*package, f"--format {name}")


def without(fields: Dict[str, Any], *names: str) -> Dict[str, Any]:
    """Fields less some."""
    return {name: value for name, value in fields.items() if name not in names}


def dumps(row: Any) -> bytes:
    """One line of JSON in UTF-8; escaped where it has what UTF-8 cannot write. Dates and the like (Parquet) as strings."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf8")
    except UnicodeEncodeError:
        return json.dumps(row, default=str).encode("ascii")
