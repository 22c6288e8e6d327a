"""Greedy decoding one token at a time: answers without a grammar, and models that cannot be decoded in parallel."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .batches import Batch, pad_right
from .constrain import Walk
from .parallel import best_allowed


class Answer(NamedTuple):
    """Token ids and their natural log-probabilities."""

    tokens: List[int]
    logprobs: List[float]


def decode(
    batch: Batch,
    limits: Sequence[int],
    end_ids: Sequence[int],
    walks: Optional[Sequence[Walk]] = None,
    entity_bias: float = 0.0,
) -> List[Answer]:
    """Decode one batch; finished rows leave it.

    batch (Batch): The prompts. limits (Sequence[int]): The most tokens of each answer. end_ids (Sequence[int]): What ends one.
    walks (Optional[Sequence[Walk]]): The grammar's of each row; None for no grammar.
    entity_bias (float): Added to the logit of beginning an entity.
    """
    answers = [Answer([], []) for _ in limits]
    active = list(range(len(limits)))
    logits = batch.first()
    while True:
        chosen, scores = choose(logits, [walks[number] for number in active] if walks else None, entity_bias)
        for number, token, logprob in zip(active, chosen.tolist(), scores.tolist()):
            answers[number].tokens.append(token)
            answers[number].logprobs.append(logprob)
            if walks:
                walks[number].advance(token)
        going_on = [
            place
            for place, number in enumerate(active)
            if answers[number].tokens[-1] not in end_ids and len(answers[number].tokens) < limits[number]
        ]
        if not going_on:
            return answers
        some = len(going_on) < len(active)
        active = [active[place] for place in going_on]
        logits = batch.next(chosen, torch.tensor(going_on, device=logits.device) if some else None)


def choose(logits: Tensor, walks: Optional[Sequence[Walk]], entity_bias: float = 0.0) -> Tuple[Tensor, Tensor]:
    """The best token of each row, of those that its grammar allows, and its log-probability among these.

    logits (Tensor): [rows, vocab]. walks (Optional[Sequence[Walk]]): One for each row; None for no grammar.
    entity_bias (float): Added to the logit of beginning an entity, not to log-probabilities.
    RETURNS (Tuple[Tensor, Tensor]): Token ids and natural log-probabilities, both [rows].
    """
    if walks is None:
        best = logits.log_softmax(-1).max(-1)
        return best.indices, best.values
    allowed = [walk.allowed() for walk in walks]
    ids, _ = pad_right(allowed, logits.device, -1)
    opens, _ = pad_right([[walk.opens(token) for token in row] for walk, row in zip(walks, allowed)], logits.device)
    kept = logits.gather(1, ids.clamp_min(0)).float().masked_fill(ids < 0, float("-inf"))
    places, scores = best_allowed(kept, opens, entity_bias)
    return ids.gather(1, places[:, None])[:, 0], scores
