"""Mentions -> character spans. What the model wrote is found in the text; what is not there is dropped and counted."""

import re
import unicodedata
from bisect import bisect_left
from functools import lru_cache
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from .prompts import flatten_text

# Scripts whose words are not parted by spaces, and Hangul, whose particles follow a name without one.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf"
    "\u3005-\u3007\u3040-\u9fff\ua960-\ua9df\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_IN_UNSPACED = re.compile(f"[{_UNSPACED}]")
_LETTERS = re.compile(rf"[^\W_{_UNSPACED}]+")
_SPACES = re.compile(r"\s+")
_JOINER = "\u200d"
# All four i's are one letter when case is ignored: Unicode folds the dotted capital to two characters.
_FOLDS = {"İ": "i", "ı": "i"}

Extent = Tuple[int, int]
Piece = Tuple[int, int, str]


class Scored(NamedTuple):
    """A mention as generated, with the engine's score of it."""

    label: str
    surface: str
    score: float


class Placed(NamedTuple):
    """A mention that stands at [start, end), in characters of the document."""

    start: int
    end: int
    label: str
    score: float


class Candidate(NamedTuple):
    """A span with the highest score it got, and the indexes of the answers that have it."""

    start: int
    end: int
    label: str
    score: float
    sources: Tuple[int, ...]


def align(mentions: Sequence[Scored], text: str, offset: int = 0) -> Tuple[List[Placed], int]:
    """Find the place of each mention in the text that the model read.

    Which occurrences count: those that are written exactly so (any white space is as good as a space: this is how the
    prompt shows the text). If there are none, those that differ in case; if there are none either, those that also
    differ in runs of white space or in compatibility form (NFKC). An occurrence stands on word boundaries: it does not
    begin or end between two letters or digits, except where a script writes words without spaces, and never before a
    combining mark or within an emoji. Occurrences of one surface do not overlap each other.

    Which occurrence it is: the model writes in order of appearance, so a mention takes the first of
    1. the occurrences after all that is placed;
    2. those at or after the start of the mention that is furthest on (so inside it or across its end), not yet taken;
    3. those before it, not yet taken;
    4. those taken under other labels: two labels share an occurrence only when no other one is left.
    A mention with no occurrence left is dropped: it repeats itself, or is not in the text.

    mentions: In the order generated.
    text: The window's text, or the document's.
    offset: Where `text` begins in the document, in characters.
    RETURNS: The placed mentions in the order generated, and the number of dropped ones.
    """
    board = _Board(text)
    placed = []
    for mention in mentions:
        extent = board.place(mention.surface, mention.label)
        if extent is not None:
            placed.append(Placed(extent[0] + offset, extent[1] + offset, mention.label, mention.score))
    return placed, len(mentions) - len(placed)


def union(*answers: Sequence[Placed]) -> List[Candidate]:
    """Join what several answers found: equal (start, end, label) are one candidate. Sorted by (start, end, label)."""
    scores: Dict[Tuple[int, int, str], float] = {}
    sources: Dict[Tuple[int, int, str], Set[int]] = {}
    for number, answer in enumerate(answers):
        for start, end, label, score in answer:
            key = (start, end, label)
            scores[key] = max(score, scores.get(key, score))
            sources.setdefault(key, set()).add(number)
    return [Candidate(*key, scores[key], tuple(sorted(sources[key]))) for key in sorted(scores)]


def resolve_overlaps(candidates: Iterable[Candidate]) -> List[Candidate]:
    """The candidates that can stand in `doc.ents` together, sorted by start.

    Of two that overlap, the one with the higher score stays, then the one with more sources, then the longer one, then
    the earlier one, then the one whose label sorts first. So what stays above a threshold is the same whether candidates below
    it are left out before or after. The order of `candidates` does not matter.
    """
    kept: List[Candidate] = []
    starts: List[int] = []
    for candidate in sorted(candidates, key=_rank):
        at = bisect_left(starts, candidate.start)
        clear_before = at == 0 or kept[at - 1].end <= candidate.start
        clear_after = at == len(kept) or candidate.end <= kept[at].start
        if clear_before and clear_after:
            kept.insert(at, candidate)
            starts.insert(at, candidate.start)
    return kept


def _rank(candidate: Candidate) -> Tuple[float, int, int, int, str]:
    length = candidate.end - candidate.start
    return -candidate.score, -len(candidate.sources), -length, candidate.start, candidate.label


class _Board:
    """A text and the mentions placed in it so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.cursor = 0  # the last start of all that is placed
        self.frontier = 0  # the last end
        self.labels: Dict[Extent, Set[str]] = {}
        self._readings: Dict[Callable[[str], Iterator[Piece]], _Reading] = {}
        self._found: Dict[str, List[Extent]] = {}
        self._n_taken: Dict[Tuple[str, Optional[str]], int] = {}

    def place(self, surface: str, label: str) -> Optional[Extent]:
        """Take the occurrence that a mention stands for, if there is one left."""
        extent = self._choose(surface.strip(), label)
        if extent is not None:
            self.labels.setdefault(extent, set()).add(label)
            self.cursor = max(self.cursor, extent[0])
            self.frontier = max(self.frontier, extent[1])
        return extent

    def _choose(self, surface: str, label: str) -> Optional[Extent]:
        extents = self._occurrences(surface)
        clear = bisect_left(extents, (self.frontier, 0))
        if clear < len(extents):
            return extents[clear]
        for taken_by in (None, label):
            # At the cursor there may be a taken one; whatever starts after it is free.
            for number in range(bisect_left(extents, (self.cursor, 0)), len(extents)):
                if not self._is_taken(extents[number], taken_by):
                    return extents[number]
            number = self._first_free(surface, extents, taken_by)
            if number < len(extents):
                return extents[number]
        return None

    def _first_free(self, surface: str, extents: List[Extent], taken_by: Optional[str]) -> int:
        """Number of the first occurrence that is not taken. What is taken stays so: each is looked at once."""
        number = self._n_taken.get((surface, taken_by), 0)
        while number < len(extents) and self._is_taken(extents[number], taken_by):
            number += 1
        self._n_taken[surface, taken_by] = number
        return number

    def _is_taken(self, extent: Extent, taken_by: Optional[str]) -> bool:
        """Whether it is taken by a label, or by any if there is none given."""
        labels = self.labels.get(extent, set())
        return bool(labels) if taken_by is None else taken_by in labels

    def _occurrences(self, surface: str) -> List[Extent]:
        if surface not in self._found:
            self._found[surface] = next(filter(None, self._search(surface)), [])
        return self._found[surface]

    def _search(self, surface: str) -> Iterator[List[Extent]]:
        for split in (_flat_pieces, _caseless_pieces, _compatible_pieces):
            if surface:
                if split not in self._readings:
                    self._readings[split] = _Reading(self.text, split)
                yield self._readings[split].find("".join(written for _, _, written in split(surface)))


class _Reading:
    """A text rewritten piece by piece, with the way back: character i was written for text[starts[i] : ends[i]]."""

    def __init__(self, text: str, split: Callable[[str], Iterator[Piece]]) -> None:
        self.text = text
        self.starts: List[int] = []
        self.ends: List[int] = []
        written = []
        for start, end, piece in split(text):
            written.append(piece)
            self.starts.extend([start] * len(piece))
            self.ends.extend([end] * len(piece))
        self.written = "".join(written)

    def find(self, surface: str) -> List[Extent]:
        """Occurrences of a surface that was rewritten the same way, ascending, without overlap."""
        found = []
        at = self.written.find(surface)
        while at >= 0:
            start, end = self.starts[at], self.ends[at + len(surface) - 1]
            if self._has_edges(at, at + len(surface)) and _stands_alone(self.text, start, end):
                found.append((start, end))
                at += len(surface)
            else:
                # No occurrence begins inside a word: a long one is passed at once.
                word = _LETTERS.match(self.text, start)
                at = max(at + 1, bisect_left(self.starts, word.end())) if word else at + 1
            at = self.written.find(surface, at)
        return found

    def _has_edges(self, at: int, end: int) -> bool:
        """Whether [at, end) is made of whole pieces."""
        begins = at == 0 or self.starts[at - 1] < self.starts[at]
        return begins and (end == len(self.starts) or self.starts[end - 1] < self.starts[end])


def _flat_pieces(text: str) -> Iterator[Piece]:
    return ((at, at + 1, char) for at, char in enumerate(flatten_text(text)))


def _caseless_pieces(text: str) -> Iterator[Piece]:
    return ((at, at + 1, _fold(char)) for at, char in enumerate(flatten_text(text)))


def _compatible_pieces(text: str) -> Iterator[Piece]:
    """White space as one space; the other characters together with the marks on them, normalised and caseless."""
    start = 0
    while start < len(text):
        space = _SPACES.match(text, start)
        end = space.end() if space else start + 1
        while not space and end < len(text) and _composes(text[end]):
            end += 1
        yield start, end, " " if space else _fold(unicodedata.normalize("NFKC", text[start:end]))
        start = end


def _fold(text: str) -> str:
    return "".join(_FOLDS.get(char) or char.casefold() for char in text)


@lru_cache(maxsize=4096)
def _composes(char: str) -> bool:
    """Whether normalisation can join a character to the one before: marks, and the later parts of a Hangul syllable."""
    first = unicodedata.normalize("NFKC", char)[0]
    return _is_mark(first) or "\u1160" <= first <= "\u11ff"


def _is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("M")


def _stands_alone(text: str, start: int, end: int) -> bool:
    if text[start].isspace() or text[end - 1].isspace():
        return False
    return _is_boundary(text, start) and _is_boundary(text, end)


def _is_boundary(text: str, at: int) -> bool:
    """Whether a name can begin or end before text[at]."""
    if at in (0, len(text)):
        return True
    before, after = text[at - 1], text[at]
    if _JOINER in (before, after) or _composes(after) or "\U0001f3fb" <= after <= "\U0001f3ff":
        return False
    if not (_is_in_word(before) and _is_in_word(after)):
        return True
    return bool(_IN_UNSPACED.match(before) or _IN_UNSPACED.match(after))


@lru_cache(maxsize=4096)
def _is_in_word(char: str) -> bool:
    is_variation_selector = "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef"
    return char.isalnum() or (_is_mark(char) and not is_variation_selector)
