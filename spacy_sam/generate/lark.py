"""The answer grammars as text, for engines that keep answers to a grammar by themselves (vLLM, by llguidance).

The text is in llguidance's dialect of Lark. Its terminals are token ids (`<[17]>`), so that it allows the very tokens that
`constrain` and `lines` allow: answers are spelled as in training, and what the grammar forces has probability one.
"""

from typing import Dict, Iterator, List, NamedTuple, Sequence

from ..errors import SamError
from ..prompts import begins_word, ends_word
from .constrain import InlineGrammar, Source, Tokens, Trie, read_source
from .grammars import AnswerGrammar
from .lines import LinesGrammar

NOTHING = 'start: ""\n'  # the answer ends at once
NEARBY = 8  # words of a surface whose tokens are compared with those of the whole text


class _Word(NamedTuple):
    """A text's tokens up to the end of a word, and the character where they end; `whole` if a word ends there."""

    tokens: Tokens
    end: int
    whole: bool


def write_grammar(grammar: AnswerGrammar, labels: Sequence[str], text: str) -> str:
    """The grammar of one request's answers, its end token left out.

    grammar (AnswerGrammar): Of the bank's format.
    labels (Sequence[str]): What is asked.
    text (str): The window's text.
    RETURNS (str): Lark text, in which `start` is the whole answer.
    """
    if isinstance(grammar, InlineGrammar):
        return _inline(grammar, labels, text)
    return _lines(grammar, labels, text)


def bias_logits(grammar: AnswerGrammar, labels: Sequence[str], entity_bias: float) -> Dict[int, float]:
    """What to add to which tokens' logits at every step, so that entities begin as readily as under an entity bias.

    grammar (AnswerGrammar): Of the bank's format.
    labels (Sequence[str]): What is asked.
    entity_bias (float): Added to the logit of beginning an entity.
    RETURNS (Dict[int, float]): By token id. In lines all tokens but the end token begin an entity, so that one gets the reverse.
    RAISES: SamError S205 if the bias would also decide how a label goes on, since the token that begins a mark occurs in labels.
    """
    if not entity_bias:
        return {}
    if isinstance(grammar, LinesGrammar):
        return {grammar.end_id: -entity_bias}
    opening = grammar.opening[0]
    if any(len(node.children) > 1 and opening in node.children for node in _nodes(grammar.trie(labels))):
        expected = "0 for labels that begin alike, since the two ends of a mark do so, too, in this base's tokens"
        raise SamError("S205", setting="entity_bias", expected=expected, found=entity_bias)
    return {opening: entity_bias}


def _inline(grammar: InlineGrammar, labels: Sequence[str], text: str) -> str:
    """A rule for each word, in two versions: `c` after a word without a mark, `o` after one with it, where a bar may come."""
    words = _words(grammar.source(text))
    if not words:
        return NOTHING
    rules = [
        "start: c0",
        f"label: {_labels(grammar.trie(labels))}",
        f"mark: {_sequence(grammar.opening)} label",
        f"bar: {_sequence(grammar.middle)}",
    ]
    for number, word in enumerate(words):
        is_last = number + 1 == len(words)
        following = grammar.end_id if is_last else words[number + 1].tokens[0]
        # A token that may go on with the text does so: it begins no mark.
        marks = [
            name
            for name, mark in (("mark", grammar.opening), ("bar", grammar.middle))
            if word.whole and mark[0] != following
        ]
        for state, kept in (("c", [name for name in marks if name != "bar"]), ("o", marks)):
            ways = kept if is_last else [f"c{number + 1}", *(f"{name} o{number + 1}" for name in kept)]
            rest = f" ({' | '.join(ways)}){'?' if is_last else ''}" if ways else ""
            rules.append(f"{state}{number}: {_sequence(word.tokens)}{rest}")
    return "\n".join(rules) + "\n"


def _words(source: Source) -> List[_Word]:
    """A text up to the end of each word."""
    words: List[_Word] = []
    begin = 0
    for at, ends in enumerate(source.ends_word, 1):
        if ends or at == len(source.tokens):
            words.append(_Word(source.tokens[begin:at], source.ends[at - 1], ends))
            begin = at
    return words


def _lines(grammar: LinesGrammar, labels: Sequence[str], text: str) -> str:
    """A rule for each word that a surface may begin with: `r`, all lines from there on. Surfaces may have any length."""
    surfaces = _Surfaces(grammar, text)
    rules: List[str] = []
    following = ""  # the rule of lines that begin later
    for number, name in enumerate(surfaces.names()):
        later = f" {following}? | {following}" if following else ""
        following = f"r{number}"
        rules.append(f"{following}: {name} label{later}")
    if not rules:
        return NOTHING
    head = [f"start: {following}?", f"label: {_labels(grammar.trie(labels))}"]
    return "\n".join([*head, *rules, *surfaces.rules()]) + "\n"


class _Surfaces:
    """Rules of the surfaces of one text.

    They are about as many as the text has words, since surfaces that go on alike share the rules of how they do: from its second
    word on, a surface is mostly spelled as in the text.
    """

    def __init__(self, grammar: LinesGrammar, text: str) -> None:
        self.encoder = grammar.encoder
        shown = self.encoder.format.shown(text)
        self.starts = [at for at in range(len(shown)) if begins_word(shown, at)]
        self.stops = [at for at in range(1, len(shown) + 1) if ends_word(shown, at)]
        self.shown = shown
        self._names: Dict[str, str] = {}

    def names(self) -> Iterator[str]:
        """For each word, the last one first, the rule of the surfaces that begin with it."""
        text = self._words(0, len(self.stops))
        after = {word.end: number for number, word in enumerate(text, 1)}
        rest = [""]  # for each word of the text, the last one first, how a surface goes on with it
        for word in reversed(text):
            rest.append(self._name(word.tokens, rest[-1]))
        rest.reverse()
        for number, start in reversed(list(enumerate(self.starts))):
            near = self._words(start, number + NEARBY)
            inner = near[1:-1]  # the last one may be spelled otherwise before what comes behind it
            at = after.get(near[0].end) if inner else None
            if at is not None and inner == text[at : at + len(inner)]:
                yield self._name(near[0].tokens, rest[at])
            elif near:
                yield self._chain(self._words(start, len(self.stops)))

    def rules(self) -> List[str]:
        return [f"{name}: {body}" for body, name in self._names.items()]

    def _words(self, start: int, n_words: int) -> List[_Word]:
        """The text from a character on to the end of one of its words."""
        stop = self.stops[min(n_words, len(self.stops)) - 1] if self.stops else 0
        words = _words(read_source(self.encoder, self.shown[start:stop]))
        return [word._replace(end=start + word.end) for word in words if word.whole]

    def _chain(self, words: Sequence[_Word]) -> str:
        name = ""
        for word in reversed(words):
            name = self._name(word.tokens, name)
        return name

    def _name(self, tokens: Tokens, rest: str) -> str:
        """The rule of these tokens, and what may come after them."""
        body = _sequence(tokens) + (f" {rest}?" if rest else "")
        return self._names.setdefault(body, f"s{len(self._names)}")


def _labels(trie: Trie) -> str:
    return " | ".join(_sequence(path) for path in _ways(trie))


def _ways(trie: Trie) -> Iterator[Tokens]:
    """The token sequences of a trie."""
    for token, node in trie.children.items():
        for rest in _ways(node) if node.children else [()]:
            yield (token, *rest)


def _nodes(trie: Trie) -> Iterator[Trie]:
    yield trie
    for node in trie.children.values():
        yield from _nodes(node)


def _sequence(tokens: Tokens) -> str:
    return " ".join(f"<[{token}]>" for token in tokens)
