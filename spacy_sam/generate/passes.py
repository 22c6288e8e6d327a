"""Forward passes over whole answers: what a model says before each token of answers that are given."""

from typing import Any, List, Protocol, Sequence

import torch
from torch import Tensor

from .batches import cache_argument, copy_cache, decoder_start, pad_left, pad_right

Rows = Sequence[Sequence[int]]


class Passes(Protocol):
    """A batch of encoded prompts."""

    def hidden(self, answers: Rows) -> Tensor:
        """The decoder's output from which each token of each answer is predicted, [rows, longest answer, width]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, by their numbers."""
        ...


class Seq2SeqPasses:
    """Of an encoder-decoder: the encoder runs once."""

    def __init__(self, model: Any, prompts: Rows) -> None:
        """model: In evaluation mode. prompts: Token ids of each row."""
        self.model = model
        self.start = decoder_start(model)
        ids, self.mask = pad_right(prompts, model.device)
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask).last_hidden_state

    def hidden(self, answers: Rows) -> Tensor:
        inputs, _ = pad_right([[self.start, *answer[:-1]] for answer in answers], self.encoded.device)
        decoder = self.model.get_decoder()
        output = decoder(
            input_ids=inputs, encoder_hidden_states=self.encoded, encoder_attention_mask=self.mask, use_cache=False
        )
        states: Tensor = output.last_hidden_state
        return states

    def keep(self, rows: Tensor) -> None:
        self.encoded, self.mask = self.encoded[rows], self.mask[rows]


class CausalPasses:
    """Of a causal model: bodies are padded on the left behind their shared prefix, and their keys and values are kept."""

    def __init__(self, model: Any, prefix_cache: Any, n_prefix: int, bodies: Rows) -> None:
        """model: In evaluation mode. prefix_cache: Of one row; it is copied. bodies: Token ids of each row."""
        self.decoder = model.get_decoder()
        self.cache = copy_cache(prefix_cache, len(bodies))
        ids, self.mask = pad_left(bodies, n_prefix, model.device)
        self.lengths = self.mask.sum(1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, n_prefix:]
        self.last = self._run(ids, self.mask, positions)[:, -1:]

    def hidden(self, answers: Rows) -> Tensor:
        inputs: List[Sequence[int]] = [answer[:-1] for answer in answers]
        if not any(inputs):
            return self.last
        ids, mask = pad_right(inputs, self.mask.device)
        positions = self.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        states = self._run(ids, torch.cat([self.mask, mask], dim=1), positions)
        self.cache.crop(-ids.shape[1])
        return torch.cat([self.last, states], dim=1)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths, self.last = self.mask[rows], self.lengths[rows], self.last[rows]

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.decoder(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(self.decoder): self.cache},
        )
        states: Tensor = output.last_hidden_state
        return states
