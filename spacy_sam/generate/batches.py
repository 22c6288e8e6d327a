"""One batch on its way through a transformers model, a step at a time: causal models and encoder-decoders."""

import copy
import inspect
from typing import Any, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor


class Batch(Protocol):
    """Rows that are decoded together."""

    def first(self) -> Tensor:
        """Logits of every row's first token. RETURNS (Tensor): [rows, vocab], float32."""
        ...

    def next(self, tokens: Tensor, rows: Optional[Tensor]) -> Tensor:
        """Logits of the next token.

        tokens (Tensor): [rows], the token that each row was given last.
        rows (Optional[Tensor]): The rows to go on with (numbers among the rows there are); None for all.
        RETURNS (Tensor): [rows that go on, vocab], float32.
        """
        ...


class CausalBatch:
    """Rows of a causal model: bodies padded on the left, behind the cached keys and values of their shared prefix."""

    def __init__(self, model: Any, prefix_cache: Any, n_prefix: int, bodies: Sequence[Sequence[int]]) -> None:
        """model: In evaluation mode. prefix_cache: Of one row; it is copied. bodies: Token ids of each row."""
        self.model = model
        self.cache = copy_cache(prefix_cache, len(bodies))
        self.ids, self.mask = pad_left(bodies, n_prefix, model.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, n_prefix:]

    def first(self) -> Tensor:
        return causal_step(self.model, self.ids, self.mask, self.positions, self.cache)

    def next(self, tokens: Tensor, rows: Optional[Tensor]) -> Tensor:
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        if rows is not None:
            self.cache.batch_select_indices(rows)
            self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], dim=1)
        return self.first()


def causal_step(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Run tokens [rows, width] after what the cache holds. RETURNS (Tensor): Logits after the last, [rows, vocab]."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    )
    return output.logits[:, -1].float()


class Seq2SeqBatch:
    """Rows of an encoder-decoder: whole prompts are encoded once, padded on the right; the decoder writes the answers."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        """model: In evaluation mode. prompts: Token ids of each row."""
        from transformers import DynamicCache, EncoderDecoderCache

        self.model = model
        ids, self.mask = pad_right(prompts, model.device)
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask)
        self.cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        self.start = ids.new_full((len(prompts),), decoder_start(model))

    def first(self) -> Tensor:
        return self._step(self.start)

    def next(self, tokens: Tensor, rows: Optional[Tensor]) -> Tensor:
        if rows is not None:
            self.cache.batch_select_indices(rows)
            self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]
            self.mask, tokens = self.mask[rows], tokens[rows]
        return self._step(tokens)

    def _step(self, tokens: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            use_cache=True,
            **{cache_argument(self.model): self.cache},
        )
        return output.logits[:, -1].float()


def cache_argument(model: Any) -> str:
    """The name by which a model takes its cache: "cache" from transformers 5.24 on, where the old name is deprecated."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def decoder_start(model: Any) -> Any:
    """The token id (int) that an encoder-decoder's answers begin with; None if its configs name none."""
    start = model.generation_config.decoder_start_token_id
    return start if start is not None else model.config.decoder_start_token_id


def copy_cache(cache: Any, n_rows: int) -> Any:
    """The keys and values of one row, for so many rows."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(n_rows)
    return copied


def pad_left(bodies: Sequence[Sequence[int]], n_prefix: int, device: Any) -> Tuple[Tensor, Tensor]:
    """Bodies [rows, width], and the attention mask with the prefix [rows, n_prefix + width]."""
    width = max(len(body) for body in bodies)
    ids = torch.zeros((len(bodies), width), dtype=torch.long)
    mask = torch.zeros((len(bodies), n_prefix + width), dtype=torch.long)
    mask[:, :n_prefix] = 1
    for row, body in enumerate(bodies):
        ids[row, width - len(body) :] = torch.tensor(body)
        mask[row, n_prefix + width - len(body) :] = 1
    return ids.to(device), mask.to(device)


def pad_right(rows: Sequence[Sequence[int]], device: Any, value: int = 0) -> Tuple[Tensor, Tensor]:
    """Rows [n, width] padded on the right with a value, and their mask."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    # One tensor of all rows: making one of each takes longer than some forward passes.
    padded = torch.tensor([[*row, *[value] * (width - length)] for row, length in zip(rows, lengths)])
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return padded.to(device=device, dtype=torch.long), mask.to(device)
