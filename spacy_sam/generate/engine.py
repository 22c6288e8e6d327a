"""The protocol of generation engines: requests in, completions out."""

import math
from typing import Dict, List, NamedTuple, Protocol, Sequence, Tuple, runtime_checkable

from ..bank import ExpertBank
from ..plan import TaskModelSpec


class Request(NamedTuple):
    """One window to annotate: which task model, which labels, which text."""

    task_model: TaskModelSpec
    labels: Tuple[str, ...]
    text: str


class Completion(NamedTuple):
    """What a task model wrote.

    text: The completion, without the end token.
    logprobs: Natural log-probability of each token under the model, the end token's included if it was reached.
    ends: For each of those tokens, the character of `text` at which it ends.
    finished: The end token was reached within the token limit.
    """

    text: str
    logprobs: Tuple[float, ...]
    ends: Tuple[int, ...]
    finished: bool

    def score(self, start: int, end: int) -> float:
        """The probability of `text[start:end]` after what comes before: the product over its tokens, between 0 and 1."""
        begins = (0, *self.ends[:-1])
        inside = [lp for lp, b, e in zip(self.logprobs, begins, self.ends) if b < end and e > start]
        return math.exp(min(sum(inside), 0.0)) if inside else 0.0


@runtime_checkable
class Engine(Protocol):
    """Generates completions; runs requests in any order inside and answers in the order given. Threads may share one.

    Task models are told apart by the versions of their experts, which requests of a plan say; see `of_versions`.

    context: Tokens that prompt and answer may have together.
    """

    context: int

    def generate(self, requests: Sequence[Request]) -> List[Completion]:
        """Complete every request, greedily."""
        ...

    def token_starts(self, text: str) -> List[int]:
        """Character starts of the model's tokens in `text`, ascending; of several tokens in one character, each."""
        ...

    def prompt_length(self, labels: Sequence[str]) -> int:
        """Tokens of a prompt for these labels with an empty text."""
        ...


def of_versions(requests: Sequence[Request], bank: ExpertBank) -> List[Request]:
    """Requests whose task models say the versions of their experts: the bank's, unless they said them already.

    RAISES: SamError S108 if an expert is not in the bank.
    """
    found: Dict[int, TaskModelSpec] = {}
    for request in requests:
        spec = request.task_model
        if id(spec) not in found:
            found[id(spec)] = bank.of_versions(spec)
    return [request._replace(task_model=found[id(request.task_model)]) for request in requests]
