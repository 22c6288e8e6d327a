"""Every coded message is used, and every use gives the message what it needs."""

import ast
import copy
import pickle
import re
from pathlib import Path
from string import Formatter
from typing import Iterator, NamedTuple, Optional, Set

import pytest

import spacy_sam
from spacy_sam.errors import MESSAGES, SamError

PACKAGE = Path(spacy_sam.__file__).parent
CODE = re.compile(r"S\d{3}")
ADDED_BY = {"SamError": set(), "from_json": {"reason"}}  # fields that a function adds to those it is called with


class Use(NamedTuple):
    """A code in the source: where, in a call of what, and with which keyword arguments (None if not all are known)."""

    place: str
    code: str
    function: str
    keywords: Optional[Set[str]]


def find_uses() -> Iterator[Use]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "errors.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf8"))
        in_calls = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                for argument in node.args:
                    if is_code(argument):
                        in_calls.add(id(argument))
                        keywords = {keyword.arg for keyword in node.keywords}
                        known = None if None in keywords else {k for k in keywords if k}
                        yield Use(place(path, node), argument.value, name_of(node.func), known)  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            if is_code(node) and id(node) not in in_calls:
                yield Use(place(path, node), node.value, "", None)  # type: ignore[attr-defined]


def is_code(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value) is not None


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"  # type: ignore[attr-defined]


def name_of(function: ast.AST) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def fields_of(code: str) -> Set[str]:
    return {field for _, field, _, _ in Formatter().parse(MESSAGES[code]) if field is not None}


USES = list(find_uses())


@pytest.mark.parametrize("code", sorted(MESSAGES))
def test_errors_code_is_named_after_its_room(code):
    assert re.fullmatch(r"S[1-8]\d\d", code)
    assert all(field.isidentifier() for field in fields_of(code))


def test_errors_uses_are_found():
    assert {"S101", "S102", "S603"} <= {use.code for use in USES}


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.place}-{use.code}")
def test_errors_used_code_exists(use):
    assert use.code in MESSAGES


@pytest.mark.parametrize(
    "use",
    [u for u in USES if u.code in MESSAGES and u.function in ADDED_BY],
    ids=lambda use: f"{use.place}-{use.code}",
)
def test_errors_fields_are_given(use):
    assert use.keywords is not None, "name the fields, so that they can be checked"
    assert fields_of(use.code) - use.keywords - ADDED_BY[use.function] == set()


def test_errors_message_has_code_and_fields():
    error = SamError("S108", name="nobody", known="a, b")
    assert error.code == "S108"
    assert error.fields == {"name": "nobody", "known": "a, b"}
    assert str(error) == "[S108] There is no expert 'nobody' in the bank. It has: a, b."
    assert isinstance(error, ValueError)


def test_errors_braces_in_fields_are_text():
    assert "{name}" in str(SamError("S108", name="{name}", known="{0}"))


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_errors_survive_pickling(again):
    cause = FileNotFoundError(2, "No such file", "bank.json")
    error = SamError("S102", path=Path("somewhere") / "bank.json", reason=cause)
    copied = again(error)
    assert type(copied) is SamError
    assert copied.code == "S102"
    assert str(copied) == str(error)
    assert copied.fields["path"] == error.fields["path"]


def test_errors_every_message_is_used():
    assert sorted(set(MESSAGES) - {use.code for use in USES}) == []
