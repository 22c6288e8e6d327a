"""What engines for generating models share: how long an answer may be, and what its tokens say."""

from typing import List, Sequence

from ..prompts import PromptEncoder
from .engine import Completion


def answer_limit(n_body: int, room: int, max_new_tokens: int) -> int:
    """Tokens an answer may have: entities are copied, so a short text has no long answer.

    n_body (int): Tokens of the text. room (int): What the prompt leaves of the context. max_new_tokens (int): As set.
    """
    return max(1, min(max_new_tokens, 3 * n_body + 16, room))


def read_completion(
    encoder: PromptEncoder, tokens: List[int], logprobs: Sequence[float], end_ids: Sequence[int]
) -> Completion:
    """The completion that these tokens write. end_ids: Those that end an answer, which are no part of its text."""
    finished = bool(tokens) and tokens[-1] in end_ids
    text, ends = encoder.decode(tokens[:-1] if finished else tokens)
    if finished:
        ends.append(len(text))
    return Completion(text, tuple(logprobs), tuple(ends), finished)
