"""The grammar of answers in lines: each line a surface that stands in the text and a label that was asked, in order."""

from functools import cached_property
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from ..corpora import Entity
from ..prompts import PromptEncoder, begins_word, ends_word
from .constrain import Tokens, Trie, make_trie, read_source

MAX_WORDS = 32  # of one surface


class Path(NamedTuple):
    """The text from the beginning of one word on, as tokens of a line; and after which of them a word ends."""

    tokens: Tokens
    ends_word: Tuple[bool, ...]


class LinesGrammar:
    """The grammar of `prompts.LinesFormat`: ` surface | label` in lines, then the end.

    A surface is a run of whole words of the text, at most `MAX_WORDS`. Surfaces begin one after the other in the text: of one
    that occurs more than once, the first that is left is taken.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        """encoder: Of a format in lines, and a tokenizer with an end token."""
        self.encoder = encoder
        self.end_id: int = encoder.tokenizer.eos_token_id
        self._labels: Dict[str, Tokens] = {}

    def walk(self, labels: Sequence[str], text: str) -> "LinesWalk":
        """The walk of a request. labels: What is asked. text: The window's text."""
        return LinesWalk(self.end_id, self.paths(text), self.trie(labels))

    def answer(self, labels: Sequence[str], text: str, entities: Iterable[Entity]) -> Optional[List[int]]:
        """Tokens of a known answer, end token included; None if an entity is not of whole words, or two begin alike."""
        shown = self.encoder.format.shown(text)
        walk = self.walk(labels, text)
        tokens: List[int] = []
        for start, end, label in sorted(entities):
            if not (begins_word(shown, start) and ends_word(shown, end)):
                return None
            tokens += [*self.encoder.plain(f" {shown[start:end]}"), *self._label(label)]
        tokens.append(self.end_id)
        return tokens if walk.follow(tokens) is not None else None

    def paths(self, text: str) -> "Paths":
        """The places where a surface may begin."""
        return Paths(self.encoder, self.encoder.format.shown(text))

    def trie(self, labels: Sequence[str]) -> Trie:
        """The token sequences of the labels, each with the mark before and the end of the line after it."""
        return make_trie(self._label(label) for label in labels)

    def _label(self, label: str) -> Tokens:
        if label not in self._labels:
            self._labels[label] = tuple(self.encoder.plain(f" | {label}\n"))
        return self._labels[label]


class Paths:
    """The text from each of its words on, tokenised when it is asked for."""

    def __init__(self, encoder: PromptEncoder, shown: str) -> None:
        self.encoder = encoder
        self.shown = shown

    @cached_property
    def all(self) -> Tuple[Path, ...]:
        """In order of the words."""
        starts = [at for at in range(len(self.shown)) if begins_word(self.shown, at)]
        stops = [at for at in range(1, len(self.shown) + 1) if ends_word(self.shown, at)]
        return tuple(
            self._path(start, stops[min(number + MAX_WORDS, len(stops)) - 1]) for number, start in enumerate(starts)
        )

    def _path(self, start: int, stop: int) -> Path:
        source = read_source(self.encoder, self.shown[start:stop])
        return Path(source.tokens, source.ends_word)


class LinesWalk:
    """Where one answer stands: at the beginning of a line, in a surface, in a label, or in what may be either.

    A text may hold what separates surface and label, so after "A |" the surface may be "A" or go on.
    """

    def __init__(self, end_id: int, paths: Paths, labels: Trie) -> None:
        self.end_id = end_id
        self.paths = paths
        self.labels = labels
        self.least = 0  # the first word that may begin the next surface
        self.places: Tuple[
            Tuple[int, int], ...
        ] = ()  # words where this surface may have begun, and tokens of it so far
        self.nodes: Tuple[Tuple[Trie, int], ...] = ()  # where in the labels, and the first word for the surface after

    @property
    def in_label(self) -> bool:
        return bool(self.nodes) and not self.places

    @property
    def at_start(self) -> bool:
        """Whether a line begins here."""
        return not self.places and not self.nodes

    @property
    def at_word_end(self) -> bool:
        """Whether the surface may end here."""
        return bool(self._ended())

    def allowed(self) -> Tokens:
        """The first one ends what can be ended: the answer, the surface."""
        found: List[int] = [self.end_id] if self.at_start else []
        for node, _ in (*self.nodes, *self._ended()):
            found += node.children
        found += (token for word, n in self._places() if (token := self._token(word, n)) is not None)
        return tuple(dict.fromkeys(found))

    def opens(self, token: int) -> bool:
        return self.at_start and token != self.end_id

    def advance(self, token: int) -> None:
        if self.at_start and token == self.end_id:
            return
        inside = (*self.nodes, *self._ended())
        places = self._places()
        self.nodes = tuple((node.children[token], least) for node, least in inside if token in node.children)
        self.places = tuple((word, n + 1) for word, n in places if self._token(word, n) == token)
        done = [least for node, least in self.nodes if not node.children]
        if done:
            self.least, self.nodes, self.places = done[0], (), ()

    def follow(self, tokens: Sequence[int]) -> Optional[List[Tokens]]:
        """Go on with all of these tokens. RETURNS: What was allowed in place of each; None if one of them was not."""
        steps = []
        for token in tokens:
            steps.append(self.allowed())
            if token not in steps[-1]:
                return None
            self.advance(token)
        return steps

    def _places(self) -> Tuple[Tuple[int, int], ...]:
        if not self.at_start:
            return self.places
        return tuple((word, 0) for word in range(self.least, len(self.paths.all)))

    def _ended(self) -> Tuple[Tuple[Trie, int], ...]:
        """The beginning of the labels, if a surface may end here: the first that does decides what comes after."""
        ended = (word for word, n in self.places if self.paths.all[word].ends_word[n - 1])
        first = next(ended, None)
        return () if first is None else ((self.labels, first + 1),)

    def _token(self, word: int, n: int) -> Optional[int]:
        tokens = self.paths.all[word].tokens
        return tokens[n] if n < len(tokens) else None
