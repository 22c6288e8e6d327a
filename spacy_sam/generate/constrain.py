"""Grammars of the answer formats: which tokens may come next, so that every answer can be read and every span is in the text.

The same grammar serves training, where the loss is taken over what it allows: what the grammar forces need not be learned.
"""

from typing import Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from ..corpora import Entity
from ..prompts import InlineFormat, PromptEncoder, begins_word, ends_word

Tokens = Tuple[int, ...]


class Walk(Protocol):
    """One answer on its way through a grammar."""

    @property
    def in_label(self) -> bool:
        """Whether the next token is one of a label."""
        ...

    def allowed(self) -> Tokens:
        """Token ids of which the next one is; never none. A single one is forced."""
        ...

    def opens(self, token: int) -> bool:
        """Whether one of the allowed tokens begins an entity."""
        ...

    def advance(self, token: int) -> None:
        """Go on with one of the allowed tokens."""
        ...


class Grammar(Protocol):
    """The walks of requests, and those of known answers."""

    def walk(self, labels: Sequence[str], text: str) -> Walk: ...

    def answer(self, labels: Sequence[str], text: str, entities: Iterable[Entity]) -> Optional[List[int]]: ...


class Trie(NamedTuple):
    """Token sequences that begin alike share a node; a sequence ends at a node without children."""

    children: Dict[int, "Trie"]


class Source(NamedTuple):
    """A text's tokens, where each begins and ends in it (its space left out), and after which of them a word ends."""

    tokens: Tokens
    starts: Tuple[int, ...]
    ends: Tuple[int, ...]
    ends_word: Tuple[bool, ...]


class InlineGrammar:
    """The grammar of `prompts.InlineFormat`: the text token by token, with marks behind words and an asked label in each.

    Entities are whole words, are not empty, and do not overlap.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        """encoder: Of an inline format, and a tokenizer with an end token."""
        self.encoder = encoder
        self.end_id: int = encoder.tokenizer.eos_token_id
        self.opening, self.middle, self.closing = (tuple(encoder.plain(mark)) for mark in InlineFormat.marks)
        self._labels: Dict[str, Tokens] = {}

    def walk(self, labels: Sequence[str], text: str) -> "InlineWalk":
        """The walk of a request. labels: What is asked. text: The window's text."""
        return InlineWalk(self, self.source(text), self.trie(labels))

    def answer(self, labels: Sequence[str], text: str, entities: Iterable[Entity]) -> Optional[List[int]]:
        """Tokens of a known answer, end token included; None if an entity is not of whole words, or two overlap."""
        shown = self.encoder.format.shown(text)
        source = read_source(self.encoder, shown)
        firsts = {start: at for at, (start, end) in enumerate(zip(source.starts, source.ends)) if start < end}
        lasts = {end: at for at, end in enumerate(source.ends) if source.ends_word[at]}
        marks: Dict[int, Tokens] = {}
        done = 0
        for start, end, label in sorted(entities):
            words = [at for at in range(start + 1, end + 1) if ends_word(shown, at)]
            whole = start in firsts and begins_word(shown, start) and words[-1:] == [end]
            if not whole or start < done or any(at not in lasts for at in words):
                return None
            marks.update({lasts[at]: self.middle for at in words[1:]})
            marks[lasts[words[0]]] = (*self.opening, *self._label(label))
            done = end
        tokens = [piece for at, token in enumerate(source.tokens) for piece in (token, *marks.get(at, ()))]
        return [*tokens, self.end_id]

    def source(self, text: str) -> Source:
        """Tokens of a text as a prompt shows it, with its words."""
        return read_source(self.encoder, self.encoder.format.shown(text))

    def _label(self, label: str) -> Tokens:
        if label not in self._labels:
            self._labels[label] = (*self.encoder.plain(f" {label}"), *self.closing)
        return self._labels[label]

    def trie(self, labels: Sequence[str]) -> Trie:
        """The token sequences of the labels, each with the closing mark."""
        return make_trie(self._label(label) for label in labels)


def read_source(encoder: PromptEncoder, shown: str) -> Source:
    """Tokens of a text, as a prompt shows it, behind the space that prompts put before it, with its words."""
    tokens, spans = encoder.spans(shown)
    following = [*spans[1:], (len(shown), len(shown))]
    ends = tuple(s < e <= after and ends_word(shown, e) for (s, e), (after, _) in zip(spans, following))
    return Source(tuple(tokens), tuple(s for s, _ in spans), tuple(e for _, e in spans), ends)


def make_trie(sequences: Iterable[Tokens]) -> Trie:
    """A trie of token sequences, none of which is the beginning of another."""
    root = Trie({})
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.children.setdefault(token, Trie({}))
    return root


class InlineWalk:
    """Where one answer stands: before which token of the text, and whether in a mark or a label."""

    def __init__(self, grammar: InlineGrammar, source: Source, labels: Trie) -> None:
        self.grammar = grammar
        self.source = source
        self.labels = labels
        self.at = 0  # the text's next token
        self.marked = True  # the word that ended here has its mark; at the beginning there is none
        self.open = False  # the word before that was marked, so an entity may go on
        self.forced: List[int] = []  # what must come next, before anything else
        self.label: Optional[Trie] = None  # where in the labels, if in one

    @property
    def in_label(self) -> bool:
        return not self.forced and self.label is not None

    def allowed(self) -> Tokens:
        if self.forced:
            return (self.forced[0],)
        if self.label is not None:
            return tuple(self.label.children)
        following = self._following()
        return (following, *(mark[0] for mark in self._marks() if mark[0] != following))

    def opens(self, token: int) -> bool:
        return token == self.grammar.opening[0] and not self.in_label

    def advance(self, token: int) -> None:
        if self.forced:
            self.forced.pop(0)
        elif self.label is not None:
            node = self.label.children[token]
            self.label = node if node.children else None
        elif token == self._following():
            self._read()
        else:
            mark = next(mark for mark in self._marks() if mark[0] == token)
            self.forced = list(mark[1:])
            self.label = self.labels if mark == self.grammar.opening else None
            self.marked = self.open = True

    def _read(self) -> None:
        """Take the text's next token."""
        if not self.marked:
            self.open = False
        self.at += 1
        self.marked = not self.source.ends_word[self.at - 1] if self.at <= len(self.source.tokens) else True

    def _following(self) -> int:
        return self.source.tokens[self.at] if self.at < len(self.source.tokens) else self.grammar.end_id

    def _marks(self) -> Tuple[Tokens, ...]:
        if self.marked:
            return ()
        return (self.grammar.opening, self.grammar.middle) if self.open else (self.grammar.opening,)
