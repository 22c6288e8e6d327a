"""Which grammar a bank's answers have, and how they are guessed."""

from typing import Any, Union

from ..prompts import InlineFormat, PromptEncoder
from .constrain import InlineGrammar, Trie
from .guesses import Guess, InlineGuess, LinesGuess
from .lines import LinesGrammar

AnswerGrammar = Union[InlineGrammar, LinesGrammar]


def make_grammar(encoder: PromptEncoder) -> AnswerGrammar:
    """The grammar of the encoder's format."""
    return InlineGrammar(encoder) if isinstance(encoder.format, InlineFormat) else LinesGrammar(encoder)


def make_guess(grammar: AnswerGrammar, labels: Trie, text: str, limit: int, known: Any = None) -> Guess:
    """A first guess of an answer.

    grammar: Of the answer. labels: Its trie of what is asked. text: The window's text. limit: The most tokens of the answer.
    known: The `content` of another guess about this text and these labels, if there was one.
    """
    if isinstance(grammar, InlineGrammar):
        return InlineGuess(grammar, grammar.source(text), labels, limit, known)
    return LinesGuess(grammar, grammar.paths(text), labels, limit, known or ())
