"""Stop watches: runs that take turns, the share of time inside a model's forward passes, and memory."""

import gc
import statistics
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple, TypeVar

import psutil
import torch

Job = TypeVar("Job")


class Output(NamedTuple):
    """What a run made: its answers, where they are text, and how many tokens."""

    answers: Tuple[str, ...]
    n_tokens: int


class Race(NamedTuple):
    """What every runner took for every job, and made of it."""

    seconds: Dict[str, List[float]]
    outputs: Dict[str, List[Output]]

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long one runner takes as another: median over the jobs, each of which both had."""
        return statistics.median(s / f for s, f in zip(self.seconds[slow], self.seconds[fast]))

    def per_second(self, name: str, amounts: Sequence[int]) -> float:
        """Median over the jobs of what a runner does in a second. amounts (Sequence[int]): What each job had of it."""
        return statistics.median(amount / took for amount, took in zip(amounts, self.seconds[name]))


def race(
    runners: Dict[str, Callable[[Job], Output]],
    jobs: Sequence[Job],
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> Race:
    """Give every job to every runner. They take turns: each job begins with another, so that none has the quiet moments.

    runners (Dict[str, Callable]): By name; they have been warmed up.
    jobs (Sequence[Job]): One for each repetition.
    device (torch.device): Waited for.
    before (Callable): Run before each run, unmeasured.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in runners}
    outputs: Dict[str, List[Output]] = {name: [] for name in runners}
    names = list(runners)
    for number, job in enumerate(jobs):
        gc.collect()
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            before()
            took, output = timed(lambda: runners[name](job), device)  # noqa: B023  # called at once
            seconds[name].append(took)
            outputs[name].append(output)
    return Race(seconds, outputs)


def timed(run: Callable[[], Any], device: torch.device) -> Tuple[float, Any]:
    """Seconds that a run takes until the device is done with it, and what it returns."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return time.perf_counter() - start, result


def synchronise(device: torch.device) -> None:
    """Wait until a CUDA device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ForwardTime:
    """Measures the time inside a model's forward passes while it is entered.

    An engine may call the model, or its body and its head by themselves: the outermost of these that runs is what counts.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.seconds = 0.0
        self._depth = 0
        self._start = 0.0
        self._hooks: List[Any] = []

    def __enter__(self) -> "ForwardTime":
        for module in self._modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _modules(self) -> Iterator[torch.nn.Module]:
        """The model, its parts and their parts: an encoder-decoder's two halves are parts of its body."""
        yield self.model
        for part in self.model.children():
            yield part
            yield from part.children()

    def _begin(self, *args: object) -> None:
        if not self._depth:
            synchronise(self.device)
            self._start = time.perf_counter()
        self._depth += 1

    def _end(self, *args: object) -> None:
        self._depth -= 1
        if not self._depth:
            synchronise(self.device)
            self.seconds += time.perf_counter() - self._start


def resident_mb() -> float:
    """Memory of this process that is in RAM."""
    return psutil.Process().memory_info().rss / 2**20
