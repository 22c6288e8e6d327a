"""Training of taggers (`generate.tagging`): which words are of which type, and where entities begin."""

from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from ..generate.tagging import tag_batch, tag_logits
from .data import IGNORED, Example

BEGIN_WEIGHT = 0.5  # what the beginnings count for in the loss, beside the types


class TagCollator:
    """Prompts padded on the right; "types" [rows, words], 0 for none, and "begins" [rows, words] of each word."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: List[List[Example]]) -> Dict[str, Tensor]:
        (examples,) = items
        answers = [example.tags for example in examples if example.tags is not None]
        return {
            **tag_batch([tags.row for tags in answers], self.pad_id),
            "types": _padded([tags.types for tags in answers]),
            "begins": _padded([tags.begins for tags in answers]),
        }


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=IGNORED)


def tag_loss(types: Tensor, begins: Tensor, batch: Dict[str, Tensor]) -> Tensor:
    """Cross entropy of the words' types, and of the beginnings among the words of entities.

    types (Tensor): [rows, words, 1 + labels]. begins (Tensor): [rows, words]. batch (Dict[str, Tensor]): See `TagCollator`.
    """
    known = batch["types"] != IGNORED
    inside = batch["types"] > 0
    loss = cross_entropy(types[known], batch["types"][known])
    if inside.any():
        loss = loss + BEGIN_WEIGHT * binary_cross_entropy_with_logits(begins[inside], batch["begins"][inside].float())
    return loss


class TagTrainer(Trainer):
    """Trains a tagger, or an adapter of one."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        types, begins = tag_logits(model, inputs)
        loss = tag_loss(types, begins, inputs)
        return (loss, {"types": types, "begins": begins}) if return_outputs else loss
