"""Progress of a run: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any, Callable, Dict, Iterable

from .job import Result
from .schedule import Tally
from .shards import Shard

EVERY = 30.0  # seconds between lines in a log


class Progress:
    """Counts what is done, by bytes of the shards, and says it."""

    def __init__(self, *, bar: bool, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """bar: Draw a bar (on stderr). say: Prints a line."""
        self._say = say
        self._clock = clock
        self._wants_bar = bar
        self._bar: Any = None
        self._sizes: Dict[str, int] = {}
        self._running: Dict[str, tuple] = {}  # shard -> documents, entities, bytes so far
        self._done = [0, 0, 0]
        self._shards = self._problems = 0
        self._started = self._said = clock()

    def start(self, shards: Iterable[Shard]) -> None:
        """shards: Those that are to be done."""
        self._sizes = {shard.key: max(1, shard.size()) for shard in shards}
        self._started = self._said = self._clock()
        if self._wants_bar and self._sizes:
            from tqdm import tqdm

            form = "{percentage:3.0f}% |{bar:20}| {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm(total=sum(self._sizes.values()), bar_format=form, dynamic_ncols=True)
            self._show()

    @property
    def tally(self) -> Tally:
        return Tally(self._on_progress, self._on_result, self._on_retry)

    def _on_progress(self, key: str, documents: int, entities: int, size: int) -> None:
        self._running[key] = (documents, entities, min(size, self._sizes[key]))
        self._show()

    def _on_result(self, result: Result) -> None:
        self._running.pop(result.key, None)
        self._shards += 1
        entry = result.entry or {}
        for place, value in enumerate((entry.get("documents", 0), entry.get("entities", 0), self._sizes[result.key])):
            self._done[place] += value
        self._problems += entry.get("malformed", 0) + entry.get("failed", 0) + bool(result.failure)
        if result.failure:
            self._write(f"{result.key}: not done: {result.failure}")
        for problem in entry.get("problems", [])[:3]:
            self._write(f"{entry['input']}, {problem['place']}: {problem['problem']}")
        self._show()

    def _on_retry(self, key: str, reason: str) -> None:
        self._running.pop(key, None)
        self._write(f"{key}: {reason}; it is done again")

    def status(self) -> str:
        """Shards, documents, documents a second, entities, problems; without a bar, the time left, too."""
        documents, entities, size = (sum(column) for column in zip(self._done, *self._running.values()))
        seconds = max(1e-9, self._clock() - self._started)
        parts = [
            f"{self._shards}/{len(self._sizes)} shards",
            f"{documents} documents, {documents / seconds:.1f}/s",
            f"{entities} entities",
            f"{self._problems} problems",
        ]
        if self._bar is None and size:
            left = seconds * (sum(self._sizes.values()) - size) / size
            parts.append(f"{_duration(left)} left")
        return ", ".join(parts)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self.status(), refresh=False)
            size = self._done[2] + sum(running[2] for running in self._running.values())
            self._bar.update(max(0, size - self._bar.n))
        elif self._clock() - self._said >= EVERY:
            self._said = self._clock()
            self._say(self.status())

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        self._say(line)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
