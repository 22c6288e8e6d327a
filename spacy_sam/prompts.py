"""Prompt formats: one template for training and inference, and the tolerant parser of its answers.

A prompt is a *prefix* (instruction and labels: the same for every window of a corpus, so that its keys and values can
be cached), a *body* (the text) and, in training, an *answer*. Each part is tokenised on its own, so that the boundary
between them never moves, and every mention keeps the leading space it has in the text: copying is then token by token.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type, Union

from .errors import SamError
from .locks import ProcessLock


class Mention(NamedTuple):
    """What a task model says: a label, the surface it copied, and where in the completion both stand (characters).

    at: Where the surface begins in the text if the model repeated the text up to there as it is; None if the format does
        not tell. Whoever has the text must look.
    """

    label: str
    surface: str
    start: int = 0
    end: int = 0
    at: Optional[int] = None


Question = Tuple[Tuple[str, ...], str]  # labels, and the text


class Parsed(NamedTuple):
    """Mentions in the order generated, and the number of lines that were not in the format."""

    mentions: List[Mention]
    n_malformed: int


def flatten_text(text: str) -> str:
    """Replace each white-space character by one space, so that an answer keeps to its line. Offsets do not move.

    White space takes in every character at which `str.splitlines` ends a line, such as \\x85 and \\u2028.
    """
    return "".join(" " if char.isspace() else char for char in text)


@dataclass(frozen=True)
class LinesFormat:
    """One line for each entity, in order of appearance: ` surface | label`. The answer ends with the end token.

    instruction: Put before the labels, for bases that follow instructions.
    max_labels: The most labels one prompt asks. Longer lists are asked in groups, as the experts were trained.
    """

    instruction: str = ""
    max_labels: int = 16
    name: ClassVar[str] = "spacy_sam.Lines.v1"
    marks: ClassVar[str] = ""

    def prefix(self, labels: Sequence[str]) -> str:
        return f"{self.instruction}Types: {'; '.join(labels)}\nText:"

    def read(self, prompt: str) -> Optional[Question]:
        """What a whole prompt asks: labels, and the text as it is shown. RETURNS: None if it is not in this format."""
        return read_prompt(prompt, self.prefix([]), self.body("").lstrip(" "))

    def groups(self, labels: Sequence[str]) -> List[Tuple[str, ...]]:
        """Labels in the fewest groups of at most `max_labels`, of like size, in order."""
        return in_groups(labels, self.max_labels)

    def shown(self, text: str) -> str:
        """The text as the model sees it: at the same offsets."""
        return flatten_text(text)

    def body(self, text: str) -> str:
        return f" {self.shown(text)}\nEntities:\n"

    def answer(self, text: str, entities: Iterable[Tuple[int, int, str]]) -> str:
        flat = flatten_text(text)
        return "".join(f" {flat[start:end]} | {label}\n" for start, end, label in sorted(entities))

    def parse(self, completion: str, labels: Sequence[str]) -> Parsed:
        mentions: List[Mention] = []
        n_malformed = 0
        # The longest first: "x | a | b" is of type "a | b" if there is one, whatever the order of the labels.
        known = {f" | {label}".rstrip(): label for label in sorted(labels, key=len, reverse=True)}
        offset = 0
        for line in re.split(r"(?<=\n)", completion):  # splitlines would also split at \x85, \u2028 and the like
            content = line.rstrip()
            ending = next((e for e in known if content.endswith(e)), None)
            surface = content[: -len(ending)].strip() if ending else ""
            if ending and surface:
                mentions.append(Mention(known[ending], surface, offset, offset + len(line)))
            elif content.strip():
                n_malformed += 1
            offset += len(line)
        return Parsed(mentions, n_malformed)

    def whole_part(self, completion: str) -> str:
        """What can be read of a completion that was cut off: its whole lines."""
        return completion[: completion.rfind("\n") + 1]


@dataclass(frozen=True)
class InlineFormat:
    """The text again, with a mark behind every word of an entity: `The Tate⟨ museum⟩ is in New⟨ city⟩ York¦.`

    The first word is followed by the label, the others by a bar. So every word is a decision (marked or not), made when the
    word has been read, which teaches small models more than a short list of what was found does (as in GNER, Ding et al.
    2024, arXiv 2402.16602), and repeated words cannot be mixed up. A word is a run of letters and digits, or any other
    character that is not white space.

    instruction, max_labels: As in `LinesFormat`.
    """

    instruction: str = ""
    max_labels: int = 16
    name: ClassVar[str] = "spacy_sam.Inline.v1"
    marks: ClassVar[str] = "⟨¦⟩"

    def prefix(self, labels: Sequence[str]) -> str:
        return f"{self.instruction}Types: {'; '.join(labels)}\nText:"

    def read(self, prompt: str) -> Optional[Question]:
        return read_prompt(prompt, self.prefix([]), "\n")

    def groups(self, labels: Sequence[str]) -> List[Tuple[str, ...]]:
        return in_groups(labels, self.max_labels)

    def shown(self, text: str) -> str:
        """The text on one line, without the marks: characters that look like them stand for them, at the same offsets."""
        return flatten_text(text).translate(LOOKALIKES)

    def body(self, text: str) -> str:
        return f" {self.shown(text)}\n"

    def answer(self, text: str, entities: Iterable[Tuple[int, int, str]]) -> str:
        """Entities that overlap an earlier one, or do not begin and end with whole words, cannot be marked: left out."""
        shown = self.shown(text)
        parts: List[str] = [" "]
        done = 0
        for start, end, label in sorted(entities, key=lambda e: (e[0], -e[1])):
            ends = [at for at in range(start + 1, end + 1) if ends_word(shown, at)]
            if start < done or not begins_word(shown, start) or ends[-1:] != [end]:
                continue
            parts += [shown[done : ends[0]], f"⟨ {label}⟩"]
            parts += [f"{shown[before:after]}¦" for before, after in itertools.pairwise(ends)]
            done = end
        return "".join([*parts, shown[done:]])

    def parse(self, completion: str, labels: Sequence[str]) -> Parsed:
        mentions: List[Mention] = []
        n_malformed = 0
        echoed = ""  # the text as repeated so far, behind a space of its own
        for found in MARKED.finditer(completion):
            piece, label = found["piece"], found["label"]
            echoed += piece
            if label is not None:
                start = _last_word(echoed)
                if label.strip() in labels and start < len(echoed):
                    at = start - 1 if start else None  # the answer lacks its first space
                    begin = max(found.start(), found.end("piece") - (len(echoed) - start))
                    mentions.append(Mention(label.strip(), echoed[start:], begin, found.end(), at))
                    continue
            elif mentions and mentions[-1].end == found.start() and piece[_last_word(piece) :] == piece.strip() != "":
                last = mentions.pop()
                mentions.append(last._replace(surface=last.surface + piece, end=found.end()))
                continue
            n_malformed += 1
        return Parsed(mentions, n_malformed)

    def whole_part(self, completion: str) -> str:
        """What can be read of a completion that was cut off: as far as the last mark."""
        return completion[: max(completion.rfind("⟩"), completion.rfind("¦")) + 1]


def read_prompt(prompt: str, prefix: str, end: str) -> Optional[Question]:
    """Labels and text of a prompt. prefix: Of no labels. end: What follows the text. RETURNS: None if it is another prompt."""
    begin = prefix.removesuffix("\nText:")
    if not prompt.startswith(begin) or not prompt.endswith(end):
        return None
    labels, found, text = prompt[len(begin) : -len(end)].partition("\nText: ")
    return (tuple(labels.split("; ")), text) if found and "\n" not in labels + text else None


def begins_word(text: str, at: int) -> bool:
    """Whether a word begins at this character."""
    return at < len(text) and not text[at].isspace() and not _in_word(text, at)


def ends_word(text: str, at: int) -> bool:
    """Whether a word ends before this character."""
    return at > 0 and not text[at - 1].isspace() and not _in_word(text, at)


def _in_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()


def _last_word(text: str) -> int:
    """Where the word at the end of a text begins: its length if it ends with white space."""
    if not text or text[-1].isspace():
        return len(text)
    start = len(text) - 1
    while _in_word(text, start):
        start -= 1
    return start


def in_groups(labels: Sequence[str], size: int) -> List[Tuple[str, ...]]:
    """Labels in the fewest groups of at most `size`, of like size, in order."""
    n_groups = -(-len(labels) // size)
    return [tuple(labels[i * len(labels) // n_groups : (i + 1) * len(labels) // n_groups]) for i in range(n_groups)]


MARKED = re.compile("(?P<piece>[^⟨⟩¦]*)(?:⟨(?P<label>[^⟨⟩¦]*)⟩|[⟨⟩¦])")
LOOKALIKES = str.maketrans("⟨¦⟩", "<|>")
PromptFormat = Union[LinesFormat, InlineFormat]
FORMATS: Dict[str, Type[Any]] = {cls.name: cls for cls in (LinesFormat, InlineFormat)}


def make_format(settings: Mapping[str, Any]) -> PromptFormat:
    """The prompt format that a bank names. RAISES: SamError S201 if this version does not know it."""
    options = {key: value for key, value in settings.items() if key != "name"}
    name = settings.get("name")
    if name not in FORMATS:
        raise SamError("S201", name=name, known=", ".join(FORMATS))
    try:
        return FORMATS[name](**options)
    except TypeError as error:
        raise SamError("S201", name=f"{name} with {sorted(options)}", known=", ".join(FORMATS)) from error


class PromptEncoder:
    """Tokenises the parts of a prompt for one tokenizer and format.

    Text is never read as special tokens, so a document that contains the end token's name is only text.
    """

    def __init__(self, tokenizer: Any, prompt_format: PromptFormat) -> None:
        """tokenizer: A fast transformers tokenizer with an end token. prompt_format: The bank's format."""
        self.tokenizer = tokenizer
        self.format = prompt_format
        self._lock = ProcessLock()  # a fast tokenizer refuses a thread while another one's call sets it up

    def _encode(self, text: str, **settings: Any) -> Any:
        with self._lock.held():
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **settings)

    def plain(self, text: str) -> List[int]:
        return self._encode(text)["input_ids"]

    def whole(self, prompt: str) -> List[int]:
        """A prompt from its beginning, with the start token if the tokenizer has one."""
        start = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        return start + self.plain(prompt)

    def prefix(self, labels: Sequence[str]) -> List[int]:
        return self.whole(self.format.prefix(labels))

    def body(self, text: str) -> List[int]:
        return self.plain(self.format.body(text))

    def answer(self, text: str, entities: Iterable[Tuple[int, int, str]]) -> List[int]:
        return [*self.plain(self.format.answer(text, entities)), self.tokenizer.eos_token_id]

    def starts(self, text: str) -> List[int]:
        """Character starts of the tokens of `text` as a prompt shows it, ascending; of several in one character, each."""
        encoded = self._encode(flatten_text(text), return_offsets_mapping=True)
        return sorted(start for start, _ in encoded["offset_mapping"])

    def spans(self, text: str) -> Tuple[List[int], List[Tuple[int, int]]]:
        """Tokens of a text behind the space that prompts put before it, and the characters of it that each one stands for.

        Leading spaces are left out, so a token of nothing else is empty. Tokens of one character have all the same one.
        """
        encoded = self._encode(f" {text}", return_offsets_mapping=True)
        spans: List[Tuple[int, int]] = []
        for begin, stop in encoded["offset_mapping"]:
            surface = text[max(begin - 1, 0) : max(stop - 1, 0)]
            end = max(stop - 1, 0)
            spans.append((end - len(surface.lstrip(" ")), end))
        return encoded["input_ids"], spans

    def decode(self, tokens: Sequence[int]) -> Tuple[str, List[int]]:
        """Text of generated tokens, and the character at which each one ends in it."""
        text = self._text(tokens)
        pieces = [self._text([token]) for token in tokens]
        if "".join(pieces) == text:
            ends = [0]
            for piece in pieces:
                ends.append(ends[-1] + len(piece))
            return text, ends[1:]
        # Characters that are spread over tokens: measure every beginning.
        return text, [min(len(self._text(tokens[: i + 1])), len(text)) for i in range(len(tokens))]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
