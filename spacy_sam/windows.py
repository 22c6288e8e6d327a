"""Doc -> windows: pieces that fit the model, with their place in the document. Nothing is ever cut off."""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Callable, List, Sequence, Tuple

from spacy.pipeline.sentencizer import Sentencizer
from spacy.tokens import Doc

from .errors import SamError

SENTENCE_FINAL = frozenset(Sentencizer.default_punct_chars)
_PIECES = re.compile(r"[A-Z]?[a-z]{1,4}|[A-Z]{2}|\S|\s(?=\s)")


@dataclass(frozen=True)
class Window:
    """A piece of a document: `text == doc.text[start : start + len(text)]`, where `start` counts characters."""

    text: str
    start: int


def doc_windows(doc: Doc, *, token_starts: Callable[[str], Sequence[int]], size: int, overlap: int) -> List[Window]:
    """Cut a document into windows, in order, that together hold every non-space character of it.

    A window ends at the first of these that is possible, each as late as the size allows:
    1. the end of a sentence, if the document has sentence boundaries, or its own end;
    2. in the window's last third, the end of sentence-final punctuation, or a blank line;
    3. in the window's last third, a line break;
    4. the end of a spaCy token;
    5. any character, for a spaCy token that is longer than a window.
    After 1 and 2, the next window goes on without overlap. After the others a name may be cut in two, so the next
    window starts `overlap` model tokens earlier (at a spaCy token, after 5 at a character); it overlaps less when the
    next spaCy token would not fit otherwise. Windows start and end with a character that is not white space, and each
    ends later than the one before.

    doc: The document; it is not changed. Only its tokens and sentence starts are read.
    token_starts: Gives the character at which each model token of a text starts, ascending. Called once, with doc.text.
    size: The most model tokens that a window touches. One character is the least that a window has, even if
        it alone has more model tokens than that.
    overlap: Model tokens, less than `size`.
    RETURNS: The windows; none if the document is empty or white space.
    RAISES: SamError S205 for a size or an overlap that is not possible.
    """
    if size < 1:
        raise SamError("S205", setting="size", expected="at least 1", found=size)
    if not 0 <= overlap < size:
        raise SamError("S205", setting="overlap", expected=f"at least 0 and less than the size ({size})", found=overlap)
    text = doc.text
    cutter = _Cutter(doc, text, token_starts(text), size, overlap)
    windows = []
    start = todo = cutter.skip_space(0)
    while todo < cutter.length:
        end, clean = cutter.find_end(start, todo)
        windows.append(Window(text[start:end].rstrip(), start))
        todo = cutter.skip_space(end)
        start = todo if clean else cutter.step_back(start, end, todo)
    return windows


def estimate_starts(text: str) -> List[int]:
    """A high guess at the characters at which model tokens start, for want of the model's tokenizer.

    Four letters of ASCII or two capitals are a token, and so is any other character but a single space; one of more than
    two bytes in UTF-8 is as many tokens as it has bytes, less one.
    """
    starts = []
    for piece in _PIECES.finditer(text):
        n_bytes = 1 if piece[0].isascii() else len(piece[0].encode("utf8", "surrogatepass"))
        starts.extend([piece.start()] * max(1, n_bytes - 1))
    return starts


class _Cutter:
    """Where a document can be cut. All positions are characters; `todo` is the first one that is in no window yet."""

    def __init__(self, doc: Doc, text: str, model_starts: Sequence[int], size: int, overlap: int) -> None:
        self.text = text
        self.length = len(text.rstrip())
        self.model_starts = model_starts
        self.size = size
        self.overlap = overlap
        self.token_starts = [token.idx for token in doc]
        self.token_ends = [token.idx + len(token) for token in doc]
        self.sentence_ends = _sentence_ends(doc)
        self.breaks, self.lines = _breaks(doc, text)

    def skip_space(self, at: int) -> int:
        while at < self.length and self.text[at].isspace():
            at += 1
        return at

    def find_end(self, start: int, todo: int) -> Tuple[int, bool]:
        """Where a window from `start` ends, after `todo`, and whether that is a clean cut, which needs no overlap."""
        reach = self._reach(start)
        last_third = self._after(start, self.size - self.size // 3)
        for ends, earliest, clean in (
            (self.sentence_ends, todo + 1, True),
            (self.breaks, max(last_third, todo + 1), True),
            (self.lines, max(last_third, todo + 1), False),
            (self.token_ends, todo + 1, False),
        ):
            last = bisect_right(ends, reach) - 1
            if last >= 0 and ends[last] >= earliest:
                return ends[last], clean
        return reach, False

    def step_back(self, start: int, end: int, todo: int) -> int:
        """Where the window after [start, end) starts, so that they overlap and it holds at least `todo`."""
        next_token = bisect_right(self.token_ends, todo)
        first = max(bisect_left(self.model_starts, end) - self.overlap, bisect_right(self.model_starts, start))
        if self.token_starts[next_token] >= end:
            first = max(first, bisect_left(self.model_starts, self.token_ends[next_token]) - self.size)
        back = self._model_start(first)
        token = bisect_left(self.token_starts, back)
        if token < len(self.token_starts) and self.token_starts[token] <= todo:
            back = self.token_starts[token]
        back = self.skip_space(back)
        return back if back < todo < self._reach(back) else todo

    def _reach(self, start: int) -> int:
        """The latest end of a window from `start`."""
        return min(max(self._after(start, self.size), start + 1), self.length)

    def _after(self, start: int, n_tokens: int) -> int:
        """The end of the first `n_tokens` model tokens from `start`; one that `start` is in the middle of counts."""
        first = bisect_left(self.model_starts, start)
        if first > 0 and (first == len(self.model_starts) or self.model_starts[first] > start):
            first -= 1
        return self._model_start(first + n_tokens)

    def _model_start(self, number: int) -> int:
        return int(self.model_starts[number]) if number < len(self.model_starts) else self.length


def _sentence_ends(doc: Doc) -> List[int]:
    """Ends of sentences, without trailing white space. A document without boundaries is one sentence."""
    ends = []
    end = 0
    for token in doc:
        if token.is_sent_start and end:
            ends.append(end)
        if not token.is_space:
            end = token.idx + len(token.text.rstrip())
    return [*ends, end]


def _breaks(doc: Doc, text: str) -> Tuple[List[int], List[int]]:
    """Ends of sentence-final punctuation and starts of blank lines; starts of all line breaks."""
    breaks = []
    lines = []
    final = False
    for token in doc:
        end = token.idx + len(token)
        if token.is_space and "\n" in token.text:
            lines.append(token.idx)
            if token.text.count("\n") > 1:
                breaks.append(token.idx)
        # A token of its own, so that no abbreviation ends a window; with the quotes and brackets that close after it.
        final = token.text in SENTENCE_FINAL or (final and (token.is_quote or token.is_right_punct))
        if final and (not token.is_ascii or text[end : end + 1].isspace()):
            breaks.append(end)
    return breaks, lines
