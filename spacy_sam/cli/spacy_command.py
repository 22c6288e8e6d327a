"""Adds `sam` to spaCy's own command line. spaCy imports this module through the `spacy_cli` entry point."""

from spacy.cli._util import app as spacy_app

from . import apply_command, bank_commands, commands, show  # noqa: F401 (registers the commands)
from .app import app

spacy_app.add_typer(app, name="sam")
