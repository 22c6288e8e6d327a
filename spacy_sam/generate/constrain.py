"""Grammars of the answer formats: which tokens may come next, so that every answer can be read and every span is in the text.

The same grammar serves training, where the loss is taken over what it allows: what the grammar forces need not be learned.
"""

from typing import Dict, Iterable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from ..corpora import Entity
from ..prompts import InlineFormat, PromptEncoder

Tokens = Tuple[int, ...]


class Walk(Protocol):
    """One answer on its way through a grammar."""

    def allowed(self) -> Tokens:
        """Token ids of which the next one is; never none. A single one is forced."""
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
    """A text's tokens, and before which of them (or at the end) an entity may begin and end.

    starts, ends: Characters of the text at which each token's own begin and end, its space left out.
    """

    tokens: Tokens
    starts: Tuple[int, ...]
    ends: Tuple[int, ...]
    may_begin: Tuple[bool, ...]
    may_end: Tuple[bool, ...]

    @property
    def last_end(self) -> int:
        """Where an open entity must end at the latest; spaces may follow."""
        return max((at for at, may in enumerate(self.may_end) if may), default=0)


class InlineGrammar:
    """The grammar of `prompts.InlineFormat`: the text token by token, with marks around entities and an asked label in each.

    Entities begin and end on word boundaries, are not empty, and do not overlap.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        """encoder: Of an inline format, and a tokenizer with an end token."""
        self.encoder = encoder
        self.end_id: int = encoder.tokenizer.eos_token_id
        self.opening, self.middle, self.closing = (tuple(encoder.plain(mark)) for mark in InlineFormat.marks)
        self._tries: Dict[Tokens, Trie] = {}
        self._labels: Dict[str, Tokens] = {}

    def walk(self, labels: Sequence[str], text: str) -> "InlineWalk":
        """The walk of a request. labels: What is asked. text: The window's text."""
        return InlineWalk(self, self.source(text), self._trie(labels))

    def answer(self, labels: Sequence[str], text: str, entities: Iterable[Entity]) -> Optional[List[int]]:
        """Tokens of a known answer, end token included; None if an entity is not on word boundaries, or two overlap."""
        source = self.source(text)
        begins = {start: at for at, start in enumerate(source.starts) if source.may_begin[at]}
        stops = {end: at + 1 for at, end in enumerate(source.ends) if source.may_end[at + 1]}
        tokens: List[int] = []
        done = 0
        for start, end, label in sorted(entities):
            first, last = begins.get(start), stops.get(end)
            if first is None or last is None or not done <= first < last:
                return None
            marked = source.tokens[first:last]
            tokens += [*source.tokens[done:first], *self.opening, *marked, *self.middle, *self._label(label)]
            done = last
        return [*tokens, *source.tokens[done:], self.end_id]

    def source(self, text: str) -> Source:
        """Tokens of a text as a prompt shows it, with its word boundaries."""
        shown = self.encoder.format.shown(text)
        tokens, spans = self.encoder.spans(shown)
        before, after = [(0, 0), *spans], [*spans[1:], (len(shown), len(shown))]
        begin = [s < e and last <= s and not _in_word(shown, s) for (s, e), (_, last) in zip(spans, before)]
        end = [s < e <= first and not _in_word(shown, e) for (s, e), (first, _) in zip(spans, after)]
        starts, ends = (tuple(side) for side in zip(*spans)) if spans else ((), ())
        return Source(tuple(tokens), starts, ends, (*begin, False), (False, *end))

    def _label(self, label: str) -> Tokens:
        if label not in self._labels:
            self._labels[label] = (*self.encoder.plain(f" {label}"), *self.closing)
        return self._labels[label]

    def _trie(self, labels: Sequence[str]) -> Trie:
        root = Trie({})
        for label in labels:
            node = root
            for token in self._label(label):
                node = node.children.setdefault(token, Trie({}))
        return root


def make_grammar(encoder: PromptEncoder) -> Optional[InlineGrammar]:
    """The grammar of the encoder's format; None if it has none."""
    return InlineGrammar(encoder) if isinstance(encoder.format, InlineFormat) else None


class InlineWalk:
    """Where one answer stands: before which token of the text, and whether in a mark, an entity or a label."""

    def __init__(self, grammar: InlineGrammar, source: Source, labels: Trie) -> None:
        self.grammar = grammar
        self.source = source
        self.labels = labels
        self.at = 0  # the text's next token
        self.inside = False  # an entity is open
        self.forced: List[int] = []  # what must come next, before anything else
        self.label: Optional[Trie] = None  # where in the labels, if in one

    def allowed(self) -> Tokens:
        if self.forced:
            return (self.forced[0],)
        if self.label is not None:
            return tuple(self.label.children)
        following = self._following()
        if not self._may_mark():
            return following
        mark = self._mark()[0]
        if self.inside and self.at == self.source.last_end:
            return (mark,)
        return following if mark in following else (*following, mark)

    def advance(self, token: int) -> None:
        if self.forced:
            self.forced.pop(0)
        elif self.label is not None:
            self.label = self.label.children[token] if self.label.children[token].children else None
        elif token in self._following() and not (self.inside and self.at == self.source.last_end):
            self.at += 1
        elif self.inside:
            self.forced, self.label, self.inside = [*self.grammar.middle[1:]], self.labels, False
        else:  # at least one token is marked
            self.forced, self.inside = [*self.grammar.opening[1:], self.source.tokens[self.at]], True
            self.at += 1

    def _following(self) -> Tokens:
        if self.at == len(self.source.tokens):
            return (self.grammar.end_id,)
        return (self.source.tokens[self.at],)

    def _may_mark(self) -> bool:
        return self.source.may_end[self.at] if self.inside else self.source.may_begin[self.at]

    def _mark(self) -> Tokens:
        return self.grammar.middle if self.inside else self.grammar.opening


def _in_word(text: str, at: int) -> bool:
    """Whether a word goes on over this place."""
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()
