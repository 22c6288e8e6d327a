"""Prompt formats: one template for training and inference, and the tolerant parser of its answers.

A prompt is a *prefix* (instruction and labels: the same for every window of a corpus, so that its keys and values can
be cached), a *body* (the text) and, in training, an *answer*. Each part is tokenised on its own, so that the boundary
between them never moves, and every mention keeps the leading space it has in the text: copying is then token by token.
"""

from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, NamedTuple, Sequence, Tuple

from .errors import SamError

MAX_LABEL_LENGTH = 100


class Mention(NamedTuple):
    """What a task model says: a label, the surface it copied, and where in the completion it stands (characters)."""

    label: str
    surface: str
    start: int = 0
    end: int = 0


class Parsed(NamedTuple):
    """Mentions in the order generated, and the number of lines that were not in the format."""

    mentions: List[Mention]
    n_malformed: int


def flatten_text(text: str) -> str:
    """Replace each white-space character by one space, so that an answer keeps to its line. Offsets do not move."""
    return "".join(" " if char.isspace() else char for char in text)


@dataclass(frozen=True)
class LinesFormat:
    """One line for each entity, in order of appearance: ` surface | label`. The answer ends with the end token."""

    instruction: str = ""
    name = "spacy_sam.Lines.v1"

    def prefix(self, labels: Sequence[str]) -> str:
        return f"{self.instruction}Types: {'; '.join(labels)}\nText:"

    def body(self, text: str) -> str:
        return f" {flatten_text(text)}\nEntities:\n"

    def answer(self, text: str, entities: Iterable[Tuple[int, int, str]]) -> str:
        flat = flatten_text(text)
        return "".join(f" {flat[start:end]} | {label}\n" for start, end, label in sorted(entities))

    def parse(self, completion: str, labels: Sequence[str]) -> Parsed:
        mentions: List[Mention] = []
        n_malformed = 0
        known = {f" | {label}": label for label in labels}
        offset = 0
        for line in completion.splitlines(keepends=True):
            content = line.rstrip("\r\n")
            ending = next((e for e in known if content.endswith(e)), None)
            surface = content[: -len(ending)].strip() if ending else ""
            if ending and surface:
                mentions.append(Mention(known[ending], surface, offset, offset + len(line)))
            elif content.strip():
                n_malformed += 1
            offset += len(line)
        return Parsed(mentions, n_malformed)


@dataclass(frozen=True)
class GroupedFormat:
    """One line for each type found: `label: surface; surface`."""

    instruction: str = ""
    name = "spacy_sam.Grouped.v1"
    prefix = LinesFormat.prefix
    body = LinesFormat.body

    def answer(self, text: str, entities: Iterable[Tuple[int, int, str]]) -> str:
        flat = flatten_text(text)
        groups: Dict[str, List[str]] = {}
        for start, end, label in sorted(entities):
            groups.setdefault(label, []).append(flat[start:end])
        return "".join(f" {label}: {'; '.join(s)}\n" for label, s in groups.items())

    def parse(self, completion: str, labels: Sequence[str]) -> Parsed:
        mentions: List[Mention] = []
        n_malformed = 0
        for line in completion.splitlines():
            label = next((l for l in labels if line.strip().startswith(f"{l}:")), None)
            if label is None:
                n_malformed += bool(line.strip())
                continue
            for surface in line.strip()[len(label) + 1 :].split("; "):
                if surface.strip():
                    mentions.append(Mention(label, surface.strip()))
        return Parsed(mentions, n_malformed)

PromptFormat = LinesFormat
