"""Windows in, candidate entities out: prompts, generation, parsing, alignment and the union of the task models."""

from dataclasses import astuple, dataclass
from typing import Dict, Iterable, List, Sequence, Tuple

from .align import Candidate, Placed, Scored, align, union
from .errors import SamError
from .generate.engine import Completion, Engine, Request
from .locks import ProcessLock
from .plan import TaskModelSpec
from .prompts import PromptFormat
from .select.base import Found
from .windows import Window

MAX_LABEL_LENGTH = 100
MIN_ROOM = 32  # tokens that text and answer need beside the prompt


@dataclass
class Counts:
    """What happened to the answers, for logs and reports.

    dropped: Mentions that are not in the text. malformed: Lines that are not in the format.
    unfinished: Answers that reached the token limit; their last line is left out.
    """

    windows: int = 0
    mentions: int = 0
    dropped: int = 0
    malformed: int = 0
    unfinished: int = 0

    def add(self, other: "Counts") -> None:
        self.windows, self.mentions, self.dropped, self.malformed, self.unfinished = (
            one + more for one, more in zip(astuple(self), astuple(other))
        )


class Annotator:
    """Asks an engine's task models for labelled spans. Holds no documents and no state but counts. Threads may share one."""

    def __init__(self, engine: Engine, prompt_format: PromptFormat) -> None:
        self.engine = engine
        self.format = prompt_format
        self.counts = Counts()
        self._lock = ProcessLock()

    def window_size(self, labels: Sequence[str], wanted: int) -> int:
        """Tokens a window may have: `wanted`, or what the labels leave of the model's context.

        RAISES: SamError S204 if the labels leave no room.
        """
        n_prefix = max(self.engine.prompt_length(group) for group in self.format.groups(labels))
        return fit_window(n_prefix, self.engine.context, wanted)

    def first_window(self, text: str, size: int) -> str:
        """The beginning of a text, at most `size` tokens of it: enough to judge experts by."""
        starts = self.engine.token_starts(text)
        return text[: starts[size]] if len(starts) > size else text

    def annotate(
        self, specs: Sequence[TaskModelSpec], labels: Sequence[str], windows: Sequence[Window]
    ) -> List[List[Candidate]]:
        """Annotate windows with every task model.

        specs (Sequence[TaskModelSpec]): The task models, in plan order.
        labels (Sequence[str]): What to ask.
        windows (Sequence[Window]): Pieces of documents, of any documents.
        RETURNS (List[List[Candidate]]): The union for each window; offsets are characters of the document, and
            `sources` index `specs`.
        """
        answers = self._answers(specs, labels, windows)
        return [union(*(answer[i] for answer in answers)) for i in range(len(windows))]

    def found(self, spec: TaskModelSpec, labels: Sequence[str], texts: Sequence[str]) -> List[Found]:
        """One task model's strict spans in some short texts, as selectors want them."""
        (answers,) = self._answers([spec], labels, [Window(text, 0) for text in texts])
        return [frozenset((p.start, p.end, p.label) for p in placed) for placed in answers]

    def _answers(
        self, specs: Sequence[TaskModelSpec], labels: Sequence[str], windows: Sequence[Window]
    ) -> List[List[List[Placed]]]:
        """For each task model, its spans in each window."""
        groups = self.format.groups(labels)
        requests = [Request(spec, group, window.text) for spec in specs for group in groups for window in windows]
        completions = iter(self.engine.generate(requests))
        answers: List[List[List[Placed]]] = [[[] for _ in windows] for _ in specs]
        counts = Counts()
        for of_model in answers:
            for group in groups:
                for answer, window in zip(of_model, windows):
                    answer.extend(self._place(next(completions), group, window, counts))
        with self._lock.held():
            self.counts.add(counts)
        return answers

    def _place(self, completion: Completion, labels: Sequence[str], window: Window, counts: Counts) -> List[Placed]:
        text = completion.text
        if not completion.finished:
            counts.unfinished += 1
            text = self.format.whole_part(text)
        parsed = self.format.parse(text, labels)
        shown = self.format.shown(window.text)
        placed: List[Placed] = []
        scored: List[Scored] = []
        for mention in parsed.mentions:
            score = completion.score(mention.start, mention.end)
            if mention.at is not None and shown.startswith(mention.surface, mention.at):
                start = window.start + mention.at
                placed.append(Placed(start, start + len(mention.surface), mention.label, score))
            else:
                scored.append(Scored(mention.label, mention.surface, score))
        found, n_dropped = align(scored, window.text, window.start)
        placed = sorted({*placed, *found})
        counts.add(Counts(1, len(parsed.mentions), n_dropped, parsed.n_malformed))
        return placed


def fit_window(n_prefix: int, context: int, wanted: int) -> int:
    """Tokens a window may have: half of what the prompt leaves of the context is kept for the answer. RAISES: SamError S204."""
    left = context - n_prefix
    if left < MIN_ROOM:
        raise SamError("S204", n_prefix=n_prefix, left=left, context=context, needed=MIN_ROOM)
    return min(wanted, left // 2)


def check_labels(labels: Iterable[str]) -> Tuple[str, ...]:
    """Labels as they are asked: stripped, in the order given, repeats left out.

    RAISES: SamError S203 for a label that is no string, empty, too long, or would break the prompt's lines.
    """
    kept: Dict[str, None] = {}
    for label in labels:
        if not isinstance(label, str):
            raise SamError("S203", label=repr(label), reason="it is not a string")
        text = label.strip()
        if not text:
            raise SamError("S203", label=repr(label), reason="it is empty")
        if len(text) > MAX_LABEL_LENGTH:
            raise SamError(
                "S203", label=repr(text[:40] + "..."), reason=f"it is over {MAX_LABEL_LENGTH} characters long"
            )
        if len(text.splitlines()) > 1 or ";" in text:
            raise SamError("S203", label=repr(text), reason="it has a line break or a semicolon")
        kept[text] = None
    return tuple(kept)
