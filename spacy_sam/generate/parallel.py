"""Greedy decoding of inline answers by an encoder-decoder, many tokens at a time, with the result of one at a time.

The text is known, so a whole answer can be guessed, and one forward pass tells every decision that the model would make in its
place. Wrong guesses are replaced by these decisions until nothing changes (Jacobi decoding, Santilli et al. 2023, arXiv
2305.10427). Each pass settles at least the first wrong decision for good, because all before it are right; so the end is
the greedy answer itself, mostly after a few passes where one token at a time takes one for every token.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .batches import decoder_start, pad_right
from .constrain import InlineGrammar, Source, Tokens, Trie

BAR: Tokens = ()  # in place of a label: the word goes on with the entity before it
Marks = Dict[int, Tokens]  # by the token that ends a word: the tokens of its label with the closing mark, or BAR


class Decision(NamedTuple):
    """One place of an answer where the grammar leaves a choice.

    place: Of the token in the answer. word: The token that ends the word it is about. depth: How many of the label's tokens
    come before it; -1 for the choice of a mark. allowed: Token ids. guess: The guessed one's place among them.
    """

    place: int
    word: int
    depth: int
    allowed: Tokens
    guess: int


@dataclass
class Guess:
    """One row: its text, what is asked, the most tokens of its answer, and the answer as guessed so far."""

    grammar: InlineGrammar
    source: Source
    labels: Trie
    limit: int
    marks: Marks = field(default_factory=dict)
    tokens: List[int] = field(default_factory=list)
    decisions: List[Decision] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    settled: List[float] = field(default_factory=list)  # log-probabilities of the first decisions, which are for good

    def write(self) -> None:
        """The answer's tokens and decisions, by the marks. A bar that has no entity before it becomes a label."""
        self.tokens, self.decisions = [], []
        following = (*self.source.tokens[1:], self.grammar.end_id)
        is_open = False
        for word, token in enumerate(self.source.tokens):
            self.tokens.append(token)
            if not self.source.ends_word[word]:
                continue
            marks = [self.grammar.opening, *([self.grammar.middle] if is_open else [])]
            allowed = (following[word], *(mark[0] for mark in marks if mark[0] != following[word]))
            label = self.marks.get(word)
            if label == BAR and not is_open:
                label = self.marks[word] = _first_path(self.labels)
            mark = None if label is None else self.grammar.middle if label == BAR else self.grammar.opening
            if mark is not None and mark[0] not in allowed:
                mark = label = None
                del self.marks[word]
            guess = 0 if mark is None else allowed.index(mark[0])
            self.decisions.append(Decision(len(self.tokens), word, -1, allowed, guess))
            self.tokens.extend(mark or ())
            self._write_label(word, label or ())
            is_open = mark is not None
        self.tokens = [*self.tokens, self.grammar.end_id][: self.limit]
        self.decisions = [decision for decision in self.decisions if decision.place < len(self.tokens)]

    def _write_label(self, word: int, label: Tokens) -> None:
        node = self.labels
        for depth, token in enumerate(label):
            allowed = tuple(node.children)
            if len(allowed) > 1:
                self.decisions.append(Decision(len(self.tokens), word, depth, allowed, allowed.index(token)))
            self.tokens.append(token)
            node = node.children[token]

    def settle(self, chosen: Sequence[int], scores: Sequence[float]) -> bool:
        """Take over what the model decides at each decision. RETURNS (bool): Whether the answer was right already.

        What was decided after right decisions alone is not asked again: rounding differs with the shapes of a batch, and two
        choices that are as good as equal could take turns for ever.
        """
        done = len(self.settled)
        chosen = [*(decision.guess for decision in self.decisions[:done]), *chosen[done:]]
        scores = [*self.settled, *scores[done:]]
        wrong = [at for at, decision in enumerate(self.decisions) if chosen[at] != decision.guess]
        if not wrong:
            self.logprobs = [0.0] * len(self.tokens)
            for decision, score in zip(self.decisions, scores):
                self.logprobs[decision.place] = score
            return True
        self.settled = list(scores[: wrong[0] + 1])
        marks: Marks = {}
        for choice, decision in zip(chosen, self.decisions):
            token = decision.allowed[choice]
            if decision.depth >= 0:
                label = marks.get(decision.word)
                if label and choice != decision.guess and label == self.marks.get(decision.word):
                    marks[decision.word] = _path(self.labels, (*label[: decision.depth], token))
            elif choice and token == self.grammar.opening[0]:
                marks[decision.word] = self.marks.get(decision.word) or _first_path(self.labels)
            elif choice:
                marks[decision.word] = BAR
        self.marks = marks
        return False


def _first_path(labels: Trie) -> Tokens:
    return _path(labels, ())


def _path(labels: Trie, begin: Tokens) -> Tokens:
    """A whole label that begins with these tokens: the first one."""
    node, path = labels, list(begin)
    for token in begin:
        node = node.children[token]
    while node.children:
        token, node = next(iter(node.children.items()))
        path.append(token)
    return tuple(path)


def decode(model: Any, prompts: Sequence[Sequence[int]], guesses: Sequence[Guess], entity_bias: float = 0.0) -> None:
    """Make every guess the model's greedy answer under the grammar.

    model (Any): An encoder-decoder in evaluation mode.
    prompts (Sequence[Sequence[int]]): Token ids of each row's prompt.
    guesses (Sequence[Guess]): One for each row, with any marks to begin with; they are changed. Log-probabilities are of the
        chosen token among the allowed ones, 0 where there is no choice, and do not have the bias in them.
    entity_bias (float): Added to the logit of beginning an entity.
    """
    ids, mask = pad_right(prompts, model.device)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    active = list(range(len(guesses)))
    while active:
        rows = [guesses[number] for number in active]
        for row in rows:
            row.write()
        answers = _decide(model, encoded, mask, rows, entity_bias)
        going_on = [place for place, (row, answer) in enumerate(zip(rows, answers)) if not row.settle(*answer)]
        if len(going_on) < len(active):
            kept = torch.tensor(going_on, dtype=torch.long, device=encoded.device)
            encoded, mask = encoded[kept], mask[kept]
            active = [active[place] for place in going_on]


def _decide(
    model: Any, encoded: Tensor, mask: Tensor, rows: Sequence[Guess], entity_bias: float
) -> List[Tuple[List[int], List[float]]]:
    """For each row, the best choice at each of its decisions and its log-probability."""
    start = decoder_start(model)
    inputs, _ = pad_right([[start, *row.tokens[:-1]] for row in rows], encoded.device)
    hidden = model.get_decoder()(
        input_ids=inputs, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state
    flat = [(number, decision) for number, row in enumerate(rows) for decision in row.decisions]
    if not flat:
        return [([], []) for _ in rows]
    at = torch.tensor([[number, decision.place] for number, decision in flat], device=encoded.device)
    allowed, _ = pad_right([decision.allowed for _, decision in flat], encoded.device, -1)
    opening = rows[0].grammar.opening[0]
    best, scores = best_allowed(
        allowed_logits(model, hidden[at[:, 0], at[:, 1]], allowed), allowed, opening, entity_bias
    )
    chosen, values = iter(best.tolist()), iter(scores.tolist())
    return [([next(chosen) for _ in row.decisions], [next(values) for _ in row.decisions]) for row in rows]


def best_allowed(logits: Tensor, allowed: Tensor, opening: int, entity_bias: float) -> Tuple[Tensor, Tensor]:
    """The best choice of each row, with a bias for beginning an entity, and its log-probability without.

    logits (Tensor): [n, choices], -inf for none. allowed (Tensor): The token ids, [n, choices]. opening: That of the mark.
    RETURNS (Tuple[Tensor, Tensor]): Places among the choices and natural log-probabilities, both [n].
    """
    best = (logits + entity_bias * (allowed == opening)).argmax(-1)
    return best, logits.log_softmax(-1).gather(-1, best[:, None])[:, 0]


def allowed_logits(model: Any, hidden: Tensor, allowed: Tensor) -> Tensor:
    """Logits of some tokens alone, where they are the decoder's output times the output layer's matrix.

    model (Any): A transformers model.
    hidden (Tensor): Its decoder's output, [n, width].
    allowed (Tensor): The token ids that are looked at in each row, [n, choices], -1 for none.
    RETURNS (Tensor): [n, choices], float32, -inf for none.
    """
    tokens, places = allowed.clamp_min(0).unique(return_inverse=True)
    logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight[tokens]).float()
    bias: Optional[Tensor] = getattr(model, "final_logits_bias", None)
    if bias is not None:
        logits = logits + bias[0][tokens].float()
    return logits.gather(1, places).masked_fill(allowed < 0, float("-inf"))


def can_decode(model: Any) -> bool:
    """Whether this model's logits are its decoder's output times the output embeddings, as for BART and not for all."""
    if not model.config.is_encoder_decoder or decoder_start(model) is None:
        return False
    start = torch.tensor([[decoder_start(model)]], device=model.device)
    with torch.inference_mode():
        encoded = model.get_encoder()(input_ids=start)
        whole = model(encoder_outputs=encoded, decoder_input_ids=start, use_cache=False).logits[0].float()
        hidden = model.get_decoder()(
            input_ids=start, encoder_hidden_states=encoded.last_hidden_state, use_cache=False
        ).last_hidden_state[0]
        ours = allowed_logits(model, hidden, torch.arange(whole.shape[1], device=model.device)[None])
    return torch.allclose(whole, ours, rtol=0.02, atol=0.02 * float(whole.std()) + 1e-6)
