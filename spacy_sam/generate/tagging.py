"""Taggers: bidirectional encoders that make every decision of an inline answer in one pass.

The prompt is that of generation: the types and the text, read together. A word is compared with the types by the states of
their tokens, as in GLiNER (Zaratiana et al. 2024, arXiv 2311.08526), here word by word: the model is a plain
`...ForTokenClassification` whose outputs are, for each token, a query (what the word is), a key (what the name means), the
logit of no entity and that of beginning one. What is found is written as an inline answer, which is read like any other.
"""

import itertools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from torch.nn.utils.rnn import pad_sequence

from ..errors import SamError
from ..prompts import InlineFormat, PromptEncoder, ends_word
from .constrain import InlineGrammar
from .engine import Completion

Spans = List[Tuple[int, int]]
LEAST_SCORE = 1e-12
NEVER = -1e4  # a logit of what is not asked, that can be added up
N_SINGLE = 2  # outputs that are no part of a query or key: no entity, and beginning one


class TagRow(NamedTuple):
    """A prompt with places: its token ids, the tokens of each type's name, the tokens of each word, and its characters."""

    ids: List[int]
    labels: Spans
    words: Spans
    characters: Spans


class Tag(NamedTuple):
    """An entity: its first and last word, its type's place among those asked, and its score between 0 and 1."""

    first: int
    last: int
    label: int
    score: float


class TagEncoder:
    """Tokenises types and text for a tagger."""

    def __init__(self, encoder: PromptEncoder) -> None:
        """encoder: Of an inline format, which has the words. RAISES: SamError S506 for another format."""
        if not isinstance(encoder.format, InlineFormat):
            raise SamError("S506", name=encoder.format.name, needed=InlineFormat.name)
        self.encoder = encoder
        self.format = encoder.format
        self.grammar = InlineGrammar(encoder)
        self._start = encoder.whole(f"{encoder.format.instruction}Types:")
        self._between, self._end = encoder.plain(";"), encoder.plain("\nText:")
        self._names: Dict[str, List[int]] = {}

    def prompt_length(self, labels: Sequence[str]) -> int:
        """Tokens of a prompt for these labels with an empty text."""
        return len(self.row(labels, "").ids)

    def row(self, labels: Sequence[str], text: str) -> TagRow:
        """The prompt of a request."""
        ids, names = list(self._start), []
        for number, label in enumerate(labels):
            name = self._name(label)
            ids += self._between if number else []
            names.append((len(ids), len(ids) + len(name)))
            ids += name
        ids += self._end
        source = self.grammar.source(text)
        words, characters = [], []
        begin: Optional[int] = None
        for at, (start, end, is_end) in enumerate(zip(source.starts, source.ends, source.ends_word)):
            if begin is None and start < end:
                begin = at
            if is_end and begin is not None:
                words.append((len(ids) + begin, len(ids) + at + 1))
                characters.append((source.starts[begin], end))
                begin = None
        return TagRow([*ids, *source.tokens], names, words, characters)

    def _name(self, label: str) -> List[int]:
        if label not in self._names:
            self._names[label] = self.encoder.plain(f" {label}")
        return self._names[label]


def tag_batch(rows: Sequence[TagRow], pad_id: int) -> Dict[str, Tensor]:
    """Rows as tensors, padded on the right.

    RETURNS (Dict[str, Tensor]): "input_ids" and "attention_mask" [rows, length]; "words" [rows, most words, 2] and "names"
        [rows, most labels, 2], the begin and end tokens of each, -1 for none.
    """
    ids = [torch.tensor(row.ids) for row in rows]
    lengths = torch.tensor([len(row.ids) for row in rows])
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "words": _padded([row.words for row in rows]),
        "names": _padded([row.labels for row in rows]),
    }


def _padded(spans: Sequence[Spans]) -> Tensor:
    rows = [torch.tensor(row, dtype=torch.long).reshape(-1, 2) for row in spans]
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def tag_logits(model: Any, batch: Dict[str, Tensor]) -> Tuple[Tensor, Tensor]:
    """What a tagger says of each word.

    model (Any): A token classification model of 2 * d + 2 outputs. batch (Dict[str, Tensor]): See `tag_batch`.
    RETURNS (Tuple[Tensor, Tensor]): Logits of no entity and of each type [rows, words, 1 + labels], -inf for types that are not
        there; logits of beginning an entity and not going on with one [rows, words]. float32.
    """
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    sums = pad(outputs.cumsum(1), (0, 0, 1, 0))
    words, names = _means(sums, batch["words"]), _means(sums, batch["names"])
    size = (outputs.shape[-1] - N_SINGLE) // 2
    types = words[..., :size] @ names[..., size : 2 * size].transpose(1, 2)
    types = types.masked_fill(batch["names"][:, None, :, 0] < 0, float("-inf"))
    return torch.cat([words[..., -2:-1], types], dim=-1), words[..., -1]


def _means(sums: Tensor, spans: Tensor) -> Tensor:
    """Means over spans [rows, spans, 2] of what `sums` [rows, length + 1, size] adds up."""
    begins, ends = spans.clamp_min(0).unbind(-1)
    rows = torch.arange(len(spans), device=sums.device)[:, None]
    return (sums[rows, ends] - sums[rows, begins]) / (ends - begins).clamp_min(1)[..., None]


def find_tags(types: Tensor, begins: Tensor, n_words: Sequence[int], entity_bias: float = 0.0) -> List[List[Tag]]:
    """The entities of each text, greedily: runs of words that are rather of some type than none, cut where a word begins anew.

    A run has the type with the highest mean logit. Its score is the product of
    1. the geometric mean of the probabilities that its words are of that type;
    2. the probability that it is cut from the words around it: 1 - P(the word before is in an entity) * P(the first word does not
       begin one), and 1 - P(the word behind is in an entity) * P(it does not begin one); at the ends of the text 1;
    3. the probability that none of its words but the first begins an entity.

    types (Tensor): [rows, words, 1 + labels], the first column for no entity. begins (Tensor): [rows, words].
    n_words (Sequence[int]): How many words each row has.
    entity_bias (float): Added to the logit of every type where it is decided whether there is an entity, not to scores.
    RETURNS (List[List[Tag]]): In order, apart from each other.
    """
    is_entity = (types[..., 1:].logsumexp(-1) + entity_bias > types[..., 0]).tolist()
    is_begin = (begins > 0).tolist()
    runs = [
        (row, first, last)
        for row, n in enumerate(n_words)
        for first, last in _runs(is_entity[row][:n], is_begin[row][:n])
    ]
    tags: List[List[Tag]] = [[] for _ in n_words]
    if runs:
        spans = torch.tensor(runs, device=types.device)
        of_type = _run_means(types.log_softmax(-1)[..., 1:].clamp_min(NEVER), spans).max(-1)
        bounds = _log_bounds(types, begins, torch.tensor(n_words, device=types.device), spans)
        scores = (of_type.values + bounds).clamp_max(0).exp()
        for (row, first, last), label, score in zip(runs, of_type.indices.tolist(), scores.tolist()):
            tags[row].append(Tag(first, last, label, score))
    return tags


def _log_bounds(types: Tensor, begins: Tensor, n_words: Tensor, spans: Tensor) -> Tensor:
    """Natural logarithm of what bounds add to the scores of some runs, [spans]: 2 and 3 of `find_tags`.

    types and begins (Tensor): See `find_tags`. n_words (Tensor): [rows]. spans (Tensor): Row, first and last word, [spans, 3].
    """
    rows, firsts, lasts = spans.unbind(-1)
    inside = types.log_softmax(-1)[..., 1:].logsumexp(-1)
    no_begin = logsigmoid(-begins)
    before, behind = (firsts - 1).clamp_min(0), (lasts + 1).clamp_max(types.shape[1] - 1)
    starts = _log_rest(inside[rows, before] + no_begin[rows, firsts]).masked_fill(firsts == 0, 0)
    ends = _log_rest(inside[rows, behind] + no_begin[rows, behind]).masked_fill(lasts + 1 >= n_words[rows], 0)
    whole = (lasts + 1 - firsts) * _run_means(no_begin[..., None], spans)[:, 0] - no_begin[rows, firsts]
    return starts + ends + whole


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 - exp(logs)), not below that of 1e-9."""
    return torch.log((1 - logs.double().exp()).clamp_min(1e-9)).float()


def _runs(is_entity: Sequence[bool], is_begin: Sequence[bool]) -> Spans:
    """First and last words of the entities of one text."""
    runs: Spans = []
    for word, is_marked in enumerate(is_entity):
        if is_marked and (is_begin[word] or not word or not is_entity[word - 1]):
            runs.append((word, word))
        elif is_marked:
            runs[-1] = (runs[-1][0], word)
    return runs


def _run_means(values: Tensor, spans: Tensor) -> Tensor:
    """Means over words first to last of some rows, [spans, size], of values [rows, words, size]."""
    # In double precision: a difference of two long sums is as exact as a short one in single precision.
    sums = pad(values.double().cumsum(1), (0, 0, 1, 0))
    rows, firsts, lasts = spans.unbind(-1)
    return ((sums[rows, lasts + 1] - sums[rows, firsts]) / (lasts + 1 - firsts)[:, None]).float()


def write_answer(shown: str, row: TagRow, tags: Sequence[Tag], labels: Sequence[str]) -> Completion:
    """An inline answer with these entities. What a parser takes for an entity, surface and marks, has its score."""
    pieces: List[Tuple[str, float]] = []
    before, done = " ", 0
    for tag in tags:
        score = math.log(max(tag.score, LEAST_SCORE))
        start, end = row.characters[tag.first][0], row.characters[tag.last][1]
        ends = [at for at in range(start + 1, end + 1) if ends_word(shown, at)]
        pieces.append((before + shown[done:start], 0.0))
        pieces.append((f"{shown[start : ends[0]]}⟨ {labels[tag.label]}⟩", score))
        pieces += [(f"{shown[one:next_]}¦", 0.0) for one, next_ in itertools.pairwise(ends)]
        before, done = "", ends[-1]
    pieces.append((before + shown[done:], 0.0))
    text = "".join(piece for piece, _ in pieces)
    piece_ends = itertools.accumulate(len(piece) for piece, _ in pieces)
    return Completion(text, tuple(score for _, score in pieces), tuple(piece_ends), True)
