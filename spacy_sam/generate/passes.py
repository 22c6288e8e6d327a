"""Forward passes over whole answers: what a model says before each token of answers that are given."""

from typing import Any, Protocol, Sequence

import torch
from torch import Tensor

from .batches import cache_argument, copy_cache, decoder_start, pad_left, pad_right

Rows = Sequence[Sequence[int]]


class Passes(Protocol):
    """A batch of prompts."""

    def hidden(self, answers: Rows, starts: Sequence[int]) -> Tensor:
        """The decoder's output from which the tokens of each answer are predicted, from some token on.

        answers (Rows): Token ids of each row's answer.
        starts (Sequence[int]): The first token of each row that is asked for, 0 at the first call. Those before it must be what
            they were at the last call.
        RETURNS (Tensor): [rows, tokens, width]; of a row's token `starts[row] + i` at place i.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, by their numbers."""
        ...


class Seq2SeqPasses:
    """Of an encoder-decoder: the encoder runs once, the decoder over whole answers."""

    def __init__(self, model: Any, prompts: Rows) -> None:
        """model: In evaluation mode. prompts: Token ids of each row."""
        self.model = model
        self.start = decoder_start(model)
        ids, self.mask = pad_right(prompts, model.device)
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask).last_hidden_state

    def hidden(self, answers: Rows, starts: Sequence[int]) -> Tensor:
        inputs, _ = pad_right([[self.start, *answer[:-1]] for answer in answers], self.encoded.device)
        decoder = self.model.get_decoder()
        output = decoder(
            input_ids=inputs, encoder_hidden_states=self.encoded, encoder_attention_mask=self.mask, use_cache=False
        )
        return _drop_first(output.last_hidden_state, starts)

    def keep(self, rows: Tensor) -> None:
        self.encoded, self.mask = self.encoded[rows], self.mask[rows]


class CausalPasses:
    """Of a causal model: the first pass reads bodies and answers behind their shared prefix, later ones what has changed.

    Keys and values of tokens that were replaced stay in the cache, behind the attention mask, until they are many.
    """

    def __init__(self, model: Any, prefix_cache: Any, n_prefix: int, bodies: Rows) -> None:
        """model: In evaluation mode. prefix_cache: Of one row; it is copied. bodies: Token ids of each row, one or more."""
        self.decoder = model.get_decoder()
        self.cache = copy_cache(prefix_cache, len(bodies))
        self.bodies, prompts = pad_left(bodies, n_prefix, model.device)
        self.n_prompt = prompts.shape[1]
        self.lengths = prompts.sum(1, keepdim=True)
        # Of each column of the cache: whether the row attends to it, and its position in the row.
        self.mask = prompts[:, :n_prefix]
        self.positions = torch.arange(n_prefix, device=model.device).expand_as(self.mask)
        self.prompts = prompts

    def hidden(self, answers: Rows, starts: Sequence[int]) -> Tensor:
        n_columns = self.mask.shape[1]
        if n_columns < self.n_prompt:
            return _drop_first(self._read_prompts(answers), starts)
        if n_columns > 2 * (self.n_prompt + max(len(answer) for answer in answers)):
            self._cut_answers(n_columns - self.n_prompt)
            return _drop_first(self._read(answers, [0] * len(answers)), starts)
        return self._read(answers, starts)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.bodies, self.lengths, self.prompts = self.bodies[rows], self.lengths[rows], self.prompts[rows]
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def _read_prompts(self, answers: Rows) -> Tensor:
        """All that comes behind the prefix."""
        ids, mask = pad_right([answer[:-1] for answer in answers], self.mask.device)
        mask = torch.cat([self.prompts, mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        n_prefix, width = self.mask.shape[1], self.bodies.shape[1]
        states = self._run(torch.cat([self.bodies, ids], dim=1), mask[:, n_prefix:], positions[:, n_prefix:])
        return states[:, width - 1 :]

    def _read(self, answers: Rows, starts: Sequence[int]) -> Tensor:
        """What comes from `starts` on; of the token before a start the output is needed, so it is read again."""
        last = self.bodies[:, -1].tolist()
        inputs = [[token, *answer[:-1]][start:] for token, answer, start in zip(last, answers, starts)]
        ids, mask = pad_right(inputs, self.mask.device)
        first = self.lengths - 1 + torch.tensor(starts, device=ids.device)[:, None]
        self.mask = self.mask * (self.positions < first)
        return self._run(ids, mask, first + torch.arange(ids.shape[1], device=ids.device))

    def _cut_answers(self, n_columns: int) -> None:
        self.cache.crop(-n_columns)
        self.mask, self.positions = self.prompts, self.positions[:, : self.n_prompt]

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, mask], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        output = self.decoder(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(self.decoder): self.cache},
        )
        states: Tensor = output.last_hidden_state
        return states


def _drop_first(states: Tensor, starts: Sequence[int]) -> Tensor:
    """Leave out the first `starts[row]` of each row's states [rows, tokens, width]."""
    if not any(starts):
        return states
    return torch.nn.utils.rnn.pad_sequence([row[start:] for row, start in zip(states, starts)], batch_first=True)
