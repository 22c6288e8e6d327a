"""Whole answers as guesses: their tokens, the decisions among them that a grammar leaves to the model, and how to mend them.

A guess is right if the model decides at each of its decisions as guessed. If not, everything up to the first wrong one is for
good, that one is mended, and the rest is guessed anew from what was there.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from .constrain import InlineGrammar, Source, Tokens, Trie
from .lines import LinesGrammar, LinesWalk, Paths

BAR: Tokens = ()  # in place of a label: the word goes on with the entity before it
Marks = Dict[int, Tokens]  # by the token that ends a word: the tokens of its label with the closing mark, or BAR


class Decision(NamedTuple):
    """One place of an answer where the grammar leaves a choice.

    place: Of the token in the answer. allowed: Token ids. opens: Which of them begin an entity. guess: The guessed one's place
    among them. about: The word (inline), by the token that ends it, or the line. depth: How many of its tokens come before:
    of an inline label, or -1 for the choice of a mark; of a line.
    """

    place: int
    allowed: Tokens
    opens: Tuple[bool, ...]
    guess: int
    about: int
    depth: int


class Guess(Protocol):
    """One row: an answer as guessed so far.

    tokens: Those of the answer, the end token last if the limit allows. decisions: In order. logprobs: When it is right, of each
    token among those allowed; 0 where there is no choice.
    """

    tokens: List[int]
    decisions: List[Decision]
    logprobs: List[float]

    @property
    def content(self) -> Any:
        """What another guess about the same text and labels may begin with."""
        ...

    def write(self) -> None:
        """Make tokens and decisions of what is guessed."""
        ...

    @property
    def open(self) -> List[Decision]:
        """The decisions that are not for good."""
        ...

    @property
    def start(self) -> int:
        """The token after the last decision that is for good: those before it do not change any more."""
        ...

    def settle(self, chosen: Sequence[int], scores: Sequence[float]) -> bool:
        """Take over what the model decides at each open decision. RETURNS (bool): Whether the answer was right already."""
        ...


@dataclass
class _Settling(ABC):
    """What all guesses have: the most tokens of the answer, and the log-probabilities of decisions that are for good."""

    limit: int
    tokens: List[int] = field(default_factory=list)
    decisions: List[Decision] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    settled: List[float] = field(default_factory=list)

    @property
    def open(self) -> List[Decision]:
        return self.decisions[len(self.settled) :]

    @property
    def start(self) -> int:
        done = self.decisions[: len(self.settled)]
        return done[-1].place + 1 if done else 0

    def settle(self, chosen: Sequence[int], scores: Sequence[float]) -> bool:
        """See `Guess`.

        What was decided after right decisions alone is not asked again: rounding differs with the shapes of a batch, and two
        choices that are as good as equal could take turns for ever.
        """
        done = self.decisions[: len(self.settled)]
        chosen = [*(decision.guess for decision in done), *chosen]
        scores = [*self.settled[: len(done)], *scores]
        wrong = [at for at, decision in enumerate(self.decisions) if chosen[at] != decision.guess]
        if not wrong:
            self.logprobs = [0.0] * len(self.tokens)
            for decision, score in zip(self.decisions, scores):
                self.logprobs[decision.place] = score
            return True
        self.settled = list(scores[: wrong[0] + 1])
        self._mend(chosen)
        return False

    @abstractmethod
    def _mend(self, chosen: Sequence[int]) -> None:
        """Take over the model's choice at each decision, after the first wrong one."""

    def _cut(self, tokens: List[int]) -> None:
        """Keep to the limit."""
        self.tokens = tokens[: self.limit]
        self.decisions = [decision for decision in self.decisions if decision.place < len(self.tokens)]


class InlineGuess(_Settling):
    """An inline answer, as the marks in a text."""

    def __init__(
        self, grammar: InlineGrammar, source: Source, labels: Trie, limit: int, marks: Optional[Marks] = None
    ) -> None:
        super().__init__(limit)
        self.grammar = grammar
        self.source = source
        self.labels = labels
        self.marks: Marks = dict(marks or {})

    @property
    def content(self) -> Marks:
        return self.marks

    def write(self) -> None:
        """A bar that has no entity before it becomes a label."""
        tokens: List[int] = []
        self.decisions = []
        following = (*self.source.tokens[1:], self.grammar.end_id)
        is_open = False
        for word, token in enumerate(self.source.tokens):
            tokens.append(token)
            if not self.source.ends_word[word]:
                continue
            marks = [self.grammar.opening, *([self.grammar.middle] if is_open else [])]
            allowed = (following[word], *(mark[0] for mark in marks if mark[0] != following[word]))
            label = self.marks.get(word)
            if label == BAR and not is_open:
                label = self.marks[word] = _path(self.labels)
            mark = None if label is None else self.grammar.middle if label == BAR else self.grammar.opening
            if mark is not None and mark[0] not in allowed:
                mark = label = None
                del self.marks[word]
            guess = 0 if mark is None else allowed.index(mark[0])
            opens = tuple(one == self.grammar.opening[0] for one in allowed)
            self.decisions.append(Decision(len(tokens), allowed, opens, guess, word, -1))
            tokens += mark or ()
            self._write_label(tokens, word, label or ())
            is_open = mark is not None
        self._cut([*tokens, self.grammar.end_id])

    def _write_label(self, tokens: List[int], word: int, label: Tokens) -> None:
        node = self.labels
        for depth, token in enumerate(label):
            allowed = tuple(node.children)
            if len(allowed) > 1:
                opens = (False,) * len(allowed)
                self.decisions.append(Decision(len(tokens), allowed, opens, allowed.index(token), word, depth))
            tokens.append(token)
            node = node.children[token]

    def _mend(self, chosen: Sequence[int]) -> None:
        marks: Marks = {}
        for choice, decision in zip(chosen, self.decisions):
            token, word = decision.allowed[choice], decision.about
            if decision.depth >= 0:
                label = marks.get(word)
                if label and choice != decision.guess and label == self.marks.get(word):
                    marks[word] = _path(self.labels, (*label[: decision.depth], token))
            elif choice and token == self.grammar.opening[0]:
                marks[word] = self.marks.get(word) or _path(self.labels)
            elif choice:
                marks[word] = BAR
        self.marks = marks


class Line(NamedTuple):
    """Tokens of a surface, and of the label with its marks."""

    surface: Tokens
    label: Tokens


class LinesGuess(_Settling):
    """An answer in lines."""

    def __init__(
        self, grammar: LinesGrammar, paths: Paths, labels: Trie, limit: int, lines: Sequence[Line] = ()
    ) -> None:
        super().__init__(limit)
        self.grammar = grammar
        self.paths = paths
        self.labels = labels
        self.lines = list(lines)

    @property
    def content(self) -> List[Line]:
        return self.lines

    def write(self) -> None:
        """Lines that the grammar does not allow after those before them are left out."""
        tokens: List[int] = []
        self.decisions = []
        kept: List[Line] = []
        walk = self._walk()
        for line in self.lines:
            probe = copy.copy(walk)
            if not line.surface or probe.follow([*line.surface, *line.label]) is None or not probe.at_start:
                continue
            self._write_line(walk, len(kept), [*line.surface, *line.label], tokens)
            walk = probe
            kept.append(line)
        self.lines = kept
        self._write_line(walk, len(kept), [self.grammar.end_id], tokens)
        self._cut(tokens)

    def _write_line(self, walk: LinesWalk, number: int, line: Sequence[int], tokens: List[int]) -> None:
        walk = copy.copy(walk)
        for depth, token in enumerate(line):
            allowed = walk.allowed()
            if len(allowed) > 1:
                opens = tuple(walk.opens(one) for one in allowed)
                self.decisions.append(Decision(len(tokens), allowed, opens, allowed.index(token), number, depth))
            tokens.append(token)
            walk.advance(token)

    def _mend(self, chosen: Sequence[int]) -> None:
        """Of each line the first wrong decision is mended."""
        wrong: Dict[int, Tuple[int, int]] = {}
        for choice, decision in zip(chosen, self.decisions):
            if choice != decision.guess:
                wrong.setdefault(decision.about, (decision.depth, decision.allowed[choice]))
        mended: List[Line] = []
        for number, line in enumerate([*self.lines, Line((), ())]):
            if number not in wrong:
                mended.append(line)
                continue
            depth, token = wrong[number]
            if not depth and token == self.grammar.end_id:
                break
            mended.append(self._mend_line(self.lines[:number], line, depth, token))
            if not depth:  # another entity comes first: this one may still come
                mended.append(line)
        self.lines = mended

    def _mend_line(self, before: Sequence[Line], line: Line, depth: int, token: int) -> Line:
        """A whole line that begins as this one does up to the wrong token, and goes on with the right one."""
        begin = [*(*line.surface, *line.label)[:depth], token]
        # The text may hold what separates surface and label, so that the surface ends before the guessed one does.
        for n in (len(line.surface), *range(depth, 0, -1)):
            ending = tuple(begin[n:])
            if ending and _leads_to(self.labels, ending) and self._after(before, begin[:n]).at_word_end:
                label = line.label if line.label[: len(ending)] == ending else _path(self.labels, ending)
                return Line(tuple(begin[:n]), label)
        walk = self._after(before, begin)
        while not walk.at_word_end:
            begin.append(walk.allowed()[0])
            walk.advance(begin[-1])
        return Line(tuple(begin), line.label or _path(self.labels))

    def _after(self, before: Sequence[Line], begin: Sequence[int]) -> LinesWalk:
        """The walk after some lines and the beginning of the next."""
        walk = self._walk()
        walk.follow([token for line in before for token in (*line.surface, *line.label)])
        walk.follow(begin)
        return walk

    def _walk(self) -> LinesWalk:
        return LinesWalk(self.grammar.end_id, self.paths, self.labels)


def _leads_to(labels: Trie, begin: Tokens) -> bool:
    """Whether a label begins with these tokens."""
    node: Optional[Trie] = labels
    for token in begin:
        node = node.children.get(token) if node else None
    return node is not None


def _path(labels: Trie, begin: Tokens = ()) -> Tokens:
    """A whole label that begins with these tokens: the first one."""
    node, path = labels, list(begin)
    for token in begin:
        node = node.children[token]
    while node.children:
        token, node = next(iter(node.children.items()))
        path.append(token)
    return tuple(path)
