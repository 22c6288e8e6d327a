"""The command line: `python -m spacy sam ...` and `spacy-sam ...`. Heavy imports happen inside the commands."""

from .app import app, main

__all__ = ["app", "main"]
