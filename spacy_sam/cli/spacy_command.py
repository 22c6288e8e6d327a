"""Adds `sam` to spaCy's own command line. spaCy imports this module through the `spacy_cli` entry point."""

import functools
import importlib
from typing import Any, List

from spacy.cli._util import app as spacy_app
from spacy.tokens import Doc

from . import apply_command, bank_commands, commands, show  # noqa: F401 (registers the commands)
from .app import app


def draw_entities() -> None:
    """Let `spacy evaluate --displacy-path` draw our entities: by itself it does so for a factory of the name "ner" alone."""
    evaluate: Any = importlib.import_module("spacy.cli.evaluate")  # `spacy.cli.evaluate` is its function
    render = evaluate.render_parses

    @functools.wraps(render)
    def render_parses(docs: List[Doc], *args: Any, ents: bool = True, **kwargs: Any) -> None:
        ours = any("plan" in group.attrs for doc in docs for group in doc.spans.values())
        render(docs, *args, ents=ents or ours, **kwargs)

    evaluate.render_parses = render_parses


spacy_app.add_typer(app, name="sam")
draw_entities()
