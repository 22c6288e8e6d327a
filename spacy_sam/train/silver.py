"""A silver corpus out of WordNet and plain text: copying spans, the answer grammar, and reading thousands of type names.

A type of which it is not known whether some word of the text falls under it is not asked.
"""

import json
import math
import random
import re
from collections import Counter, defaultdict, deque
from itertools import chain, count, islice
from pathlib import Path
from typing import Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from ..corpora import Entity
from ..errors import SamError
from .silver_tables import FILLERS, MADE, PATTERNS, TEMPLATES, TITLES, VAGUE
from .wordnet import EMPTY, Reader, Reading, Span, WordNet

KINDS = {"is-a": 0.55, "names": 0.35, "pattern": 0.10}  # the share of records of each kind
N_PRESENT = (22, 26, 20, 15, 10, 7)  # how often 1, 2, ... 6 types are asked that the text has
N_ABSENT = (14, 16, 17, 17, 14, 12, 10)  # how often 0, 1, ... 6 that it has not
NONE = 0.1  # how often only absent types are asked
UNFOUND = 0.15  # how often a type stays asked whose words all went to more specific types
CALLERS = 0.4  # how often a running text is the caller's, if there are any
LOWERED, RAISED = 0.08, 0.02  # how often a text is put in lower case, and in capitals
MAX_TRIED = 5000  # texts in a row that make no record, before it is found impossible
BROAD = 60  # hyponyms from which a type may well cover a word that WordNet does not know
LARGE = 140  # hyponyms from which a type of a name in `VAGUE` is not asked
WORDS = range(3, 61)


class SilverRecord(NamedTuple):
    """A text, its entities (sorted, apart from each other) and the types asked: those of the entities and absent ones."""

    text: str
    entities: Tuple[Entity, ...]
    labels: Tuple[str, ...]


class _Maker:
    """Makes records of every kind; one `rng` for all that is drawn."""

    def __init__(self, wordnet: WordNet, texts: Sequence[str], rng: random.Random) -> None:
        self.wordnet, self.texts, self.rng = wordnet, texts, rng
        self.reader = Reader(wordnet)
        self.shown = self._all_type_names()
        self.below: Dict[int, List[int]] = defaultdict(list)
        for type_ in self.shown:
            for parent in wordnet.synsets[type_].parents:
                self.below[parent].append(type_)
        self.above_person = wordnet.above.get(self.reader.person, EMPTY) - {self.reader.person}
        self.use = {type_: 1 + math.log1p(self._count(names[0], type_)) / 2 for type_, names in self.shown.items()}
        self.asked: Counter = Counter()
        self.recent: deque = deque(maxlen=3000)
        synsets = wordnet.synsets.items()
        self.glossed = [s for s, synset in synsets if synset.definition and not synset.is_name]
        self.names: Dict[str, List[int]] = {"any": [s for s, synset in synsets if synset.is_name and synset.definition]}
        for kind in ("person", "city", "country", "river", "body of water", "location", "event"):
            heads = {sense.synset for sense in wordnet.nouns.get(kind, ())[:2]}
            self.names[kind] = [s for s in self.names["any"] if wordnet.above[s] & heads]
        people = [self._full_name(s).split() for s in self.names["person"]]
        self.given = [name[0] for name in people if len(name) == 2 and name[0].isalpha() and name[0] not in TITLES]
        self.made = {slot: list(_forms(wordnet, lines.strip().splitlines())) for slot, lines in MADE.items()}
        self.makers = {"is-a": self.is_a, "names": self.named, "pattern": self.pattern}

    def _all_type_names(self) -> Dict[int, List[str]]:
        """The types that can be asked with their names; a name of several types is left to the largest."""
        names = {type_: self._type_names(type_) for type_ in self.wordnet.synsets}
        owner: Dict[str, int] = {}
        for type_ in sorted(names, key=self.wordnet.size.__getitem__):
            owner.update(dict.fromkeys((name.lower() for name in names[type_]), type_))
        kept = {type_: [name for name in names[type_] if owner[name.lower()] == type_] for type_ in names}
        return {type_: names for type_, names in kept.items() if names}

    def _type_names(self, type_: int) -> List[str]:
        """The words of a synset that first of all mean it; none if it is too vague, too narrow or a name."""
        synset, size = self.wordnet.synsets[type_], self.wordnet.size
        is_vague = size[type_] >= LARGE and synset.lemmas[0] in VAGUE
        if synset.is_name or is_vague or not synset.definition or size[type_] < 3:
            return []
        names = []
        for lemma in synset.lemmas:
            senses = self.wordnet.nouns.get(lemma.lower(), ())
            total = sum(sense.uses + 1 for sense in senses)
            mine = sum(sense.uses + 1 for sense in senses if sense.synset == type_)
            first = senses[0].synset if senses else -1
            if first == type_ or mine >= total / 2 or (mine >= total / 5 and size[type_] >= 10 * size[first]):
                names.append(lemma)
        return names if names and (self._count(names[0], type_) or size[type_] >= 8) else []

    def _count(self, name: str, type_: int) -> int:
        return sum(sense.uses for sense in self.wordnet.nouns[name.lower()] if sense.synset == type_)

    def _show(self, type_: int) -> str:
        """A type as it is asked."""
        names, luck = self.shown[type_], self.rng.random()
        name = names[0] if luck < 0.85 or len(names) == 1 else self.rng.choice(names)
        if luck > 0.96 and len(names) > 1:
            return " or ".join(self.rng.sample(names, 2))
        if self.rng.random() < 0.06 and " of " not in name:
            name = _plural(name)
        return name[0].upper() + name[1:] if self.rng.random() < 0.03 else name

    # Choosing what to ask

    def record(self, text: str, reading: Reading, only_names: bool = False) -> Optional[SilverRecord]:
        """Choose types for a text that was read; None if nothing can be asked of it."""
        named = EMPTY.union(*(span.sure for span in reading.spans if span.is_name))
        plain = EMPTY.union(*(span.sure for span in reading.spans if not span.is_name))
        maybe = EMPTY.union(*(span.maybe for span in reading.spans if span.is_name or not only_names))
        spans = [span for span in reading.spans if span.is_name or not only_names]
        mixed = self.above_person if only_names else named & plain
        usable = [(span, self._usable(span.sure - maybe - mixed, reading)) for span in spans]
        open_to = [(span, types) for span, types in usable if types]
        is_none = self.rng.random() < NONE
        if not open_to and not is_none:
            return None
        n_present = 0 if is_none else self.rng.choices(range(1, 7), N_PRESENT)[0]
        present = list(dict.fromkeys(self._draw(*self.rng.choice(open_to)) for _ in range(n_present)))
        found = self._assign(spans, present)
        used = {type_ for _, type_ in found}
        present = [type_ for type_ in present if type_ in used or self.rng.random() < UNFOUND]
        n_absent = self.rng.choices(range(7), N_ABSENT)[0] or (0 if present else 1)
        absent = self._absent(present, n_absent, reading)
        shown = {type_: self._show(type_) for type_ in (*present, *absent)}
        if not shown or len({name.lower() for name in shown.values()}) < len(shown):
            return None
        self.asked.update(present)
        self.recent.extend(present)
        entities = tuple((span.start, span.end, shown[type_]) for span, type_ in found)
        return SilverRecord(text, entities, self._shuffled(shown.values()))

    def _assign(self, spans: Sequence[Span], types: Sequence[int]) -> List[Tuple[Span, int]]:
        """The spans that are of one of the types, each with the most specific of them."""
        fitting = [(span, [type_ for type_ in types if type_ in span.sure]) for span in spans]
        return [(span, min(its, key=self.wordnet.size.__getitem__)) for span, its in fitting if its]

    def _shuffled(self, labels: Iterable[str]) -> Tuple[str, ...]:
        order = list(labels)
        self.rng.shuffle(order)
        return tuple(order)

    def _usable(self, types: Iterable[int], reading: Reading) -> List[int]:
        """Those types that can be asked, and that no unknown word of the text may be of."""
        usable = sorted(type_ for type_ in types if type_ in self.shown)
        if reading.unknown:
            usable = [type_ for type_ in usable if self.wordnet.size[type_] <= BROAD]
        if reading.unknown_name:
            usable = [type_ for type_ in usable if type_ not in self.reader.can_be_named]
        return usable

    def _draw(self, span: Span, types: Sequence[int]) -> int:
        """One of the types: rather a word in use, one that was asked little, and not the span's own word."""
        own = min(span.sure, key=self.wordnet.size.__getitem__)
        weights = [self.use[t] * (1 + self.asked[t]) ** -0.4 * (0.2 if t == own else 1) for t in types]
        return self.rng.choices(types, weights)[0]

    def _absent(self, present: Sequence[int], n: int, reading: Reading) -> List[int]:
        seen = EMPTY.union(*(span.sure | span.maybe for span in reading.spans))
        absent: List[int] = []
        for _ in range(3 * n):
            if present and self.rng.random() < 0.4:
                parents = self.wordnet.synsets[self.rng.choice(present)].parents
                pool: Sequence[int] = [t for parent in parents for t in self.below[parent]]
            else:
                pool = self.recent
            type_ = self.rng.choice(pool) if pool else None
            if type_ is None or type_ in seen or type_ in absent or not self._usable([type_], reading):
                continue
            if self.reader.person in seen and self.reader.person in self.wordnet.above[type_]:
                continue  # a writer may be a father and a traveller: WordNet does not say
            absent.append(type_)
        return absent[:n]

    # Is-a

    def running_text(self) -> Tuple[str, List[Span]]:
        """A text, and what is known of it."""
        if self.texts and self.rng.random() < CALLERS:
            return " ".join(self.rng.choice(self.texts).split()), []
        luck = self.rng.random()
        if luck < 0.5 or not self.glossed:
            return self.rng.choice(self.wordnet.examples or [""]), []
        if luck < 0.6 and self.wordnet.verbs:
            verb, gloss = self.rng.choice(self.wordnet.verbs)
            lead = self.rng.choice(("to ", "To "))
            return f"{lead}{verb} is to {gloss.removeprefix('to ')}", [
                Span(len(lead), len(lead + verb), EMPTY, EMPTY, False)
            ]
        return self._gloss()

    def _gloss(self) -> Tuple[str, List[Span]]:
        type_ = self.rng.choice(self.glossed)
        synset = self.wordnet.synsets[type_]
        name, gloss = self.rng.choice(synset.lemmas), _trim(synset.definition, self.rng)
        if re.match("(an?|any|one|the) ", gloss) and name[0].islower() and self.rng.random() < 0.7:
            article = "an" if name[0] in "aeiou" else "a"
            templates = ["{a} {n} is {g}", "{a} {n} is {g}.", "this {n}, {g}, was new to us", "is {a} {n} {g} ?"]
        else:
            article, templates = "", ["{n}: {g}", "{n} means {g}", "{n} ({g})", "{g} is called {n}", "{n} - {g}"]
        before, after = self.rng.choice(templates).replace("{a}", article).replace("{g}", gloss).split("{n}", 1)
        if self.rng.random() < 0.6:
            before, name = (before[0].upper() + before[1:], name) if before else ("", name[0].upper() + name[1:])
        is_name = name[1:] != name[1:].lower()
        span = Span(len(before), len(before + name), self.wordnet.above[type_], EMPTY, is_name)
        return before + name + after, [span]

    def is_a(self) -> Optional[SilverRecord]:
        """A record of kind "is-a"."""
        text, forced = self.running_text()
        if len(text.split()) not in WORDS or "|" in text:
            return None
        return self._recase(self.record(text, self.reader.read(text, forced)), 0.3)

    def _recase(self, record: Optional[SilverRecord], often: float = 1.0) -> Optional[SilverRecord]:
        """Put some texts in lower case, fewer in capitals; offsets do not move."""
        if record is None:
            return None
        luck, text = self.rng.random() / often, record.text
        if luck < LOWERED + RAISED:
            text = text.lower() if luck < LOWERED else text.upper()
        return record._replace(text=text) if len(text) == len(record.text) else record

    # Names

    def _full_name(self, synset: int) -> str:
        lemmas = [lemma for lemma in self.wordnet.synsets[synset].lemmas if lemma[0].isupper()]
        longer = [lemma for lemma in lemmas if " " in lemma]
        return (longer or lemmas or list(self.wordnet.synsets[synset].lemmas))[0]

    def _invent(self, slot: str) -> Tuple[str, FrozenSet[int], FrozenSet[int]]:
        """A name that is made after other names, and what it is the name of."""
        form, synset = self.rng.choice(self.made[slot])
        for part in ("person", "city", "country"):
            if f"{{{part}}}" in form and self.names[part]:
                name = self._full_name(self.rng.choice(self.names[part]))
                form = form.replace(f"{{{part}}}", _surname(name) if part == "person" else name)
        return form.replace("{year}", FILLERS["year"](self.rng)), self.wordnet.above[synset], EMPTY

    def _name(self, synset: int, is_told: bool) -> Tuple[str, FrozenSet[int], FrozenSet[int]]:
        """A name for a named synset, the types it is of, and those it may be of."""
        above, luck = self.wordnet.above[synset], self.rng.random()
        if self.reader.person not in above:
            lemmas = self.wordnet.synsets[synset].lemmas
            return self.rng.choice([lemma for lemma in lemmas if lemma[0].isupper()] or lemmas), above, EMPTY
        full = self._full_name(synset)
        surname = _surname(full)
        if luck < 0.5 or surname == full:
            return full, above, EMPTY
        if luck < 0.6 and not is_told:
            return surname, self.wordnet.above[self.reader.person], above
        made = f"{self.rng.choice(self.given)} {surname}" if self.given else full
        return (made, above, EMPTY) if is_told else (made, self.wordnet.above[self.reader.person], above)

    def named(self) -> Optional[SilverRecord]:
        """A record of kind "names"."""
        text, spans = "", []
        template = self.rng.choice(TEMPLATES)
        about = re.search(r"\{([^}]*):told\}", template)
        told = self.rng.choice(self.names[about[1]] or [-1]) if about else -1
        for piece in re.split(r"(\{.*?\})", template):
            slot, _, is_told = piece.strip("{}").partition(":")
            if not piece.startswith("{"):
                text += piece
            elif slot in ("gloss", "type"):
                text += self._told(told, slot)
            elif slot in FILLERS:
                text += FILLERS[slot](self.rng)
            else:
                invented = "made" if slot == "any" and not is_told and self.rng.random() < 0.2 else slot
                if not self.made.get(invented) and not self.names.get(slot):
                    return None
                if self.made.get(invented):
                    name, sure, maybe = self._invent(invented)
                else:
                    synset = told if is_told else self.rng.choice(self.names[slot])
                    name, sure, maybe = self._name(synset, bool(is_told))
                spans.append(Span(len(text), len(text + name), sure, maybe - sure, True))
                text += name
        if len(text.split()) not in WORDS or "|" in text:
            return None
        return self._recase(self.record(text, self.reader.read(text, spans), only_names=True))

    def _told(self, synset: int, how: str) -> str:
        if how == "gloss":
            return _trim(self.wordnet.synsets[synset].definition, self.rng)
        parents = [p for p in self.wordnet.synsets[synset].parents if p in self.shown]
        return self.shown[self.rng.choice(parents)][0] if parents else "famous"

    # Patterns

    def pattern(self) -> Optional[SilverRecord]:
        """A record of kind "pattern"."""
        text = self.running_text()[0]
        if self.rng.random() < 0.5:
            added = FILLERS[self.rng.choice(list(FILLERS))](self.rng)
            text = self.rng.choice((f"{text} {added}", f"{added} : {text}", f"{text} ( {added} )", f"{text}, {added}"))
        if len(text.split()) not in WORDS or "|" in text:
            return None
        matches: Dict[str, List[Tuple[int, int]]] = {}
        taken: Set[int] = set()
        names = {self.rng.choice(shown): pattern for shown, pattern in PATTERNS}
        letter = self.rng.choice("abcdefghilmnoprstw")
        names[f"word starting with {letter}"] = re.compile(rf"(?<![\w'’@#/.:-]){letter}(?:[\w'’-]*\w)?(?![\w@])", re.I)
        found = {name: [m.span() for m in pattern.finditer(text)] for name, pattern in names.items()}
        n_present = 0 if self.rng.random() < NONE else self.rng.choices(range(1, 7), N_PRESENT)[0]
        for name in self._shuffled(name for name in found if found[name])[:n_present]:
            inside = {i for start, end in found[name] for i in range(start, end)}
            if not taken & inside:
                matches[name] = found[name]
                taken |= inside
        absent = [name for name in names if not found[name]]
        labels = [*matches, *self.rng.sample(absent, min(len(absent), self.rng.choices(range(7), N_ABSENT)[0]))]
        entities = sorted((start, end, name) for name, spans in matches.items() for start, end in spans)
        return SilverRecord(text, tuple(entities), self._shuffled(labels)) if labels and len(entities) <= 12 else None


def _forms(wordnet: WordNet, lines: Iterable[str]) -> Iterator[Tuple[str, int]]:
    """The forms of made names, each with the synset that it names one of."""
    for line in lines:
        head, _, forms = line.partition(": ")
        word, _, number = head.rpartition(" ")
        for sense in wordnet.nouns.get(word, ())[int(number) - 1 : int(number)]:
            yield from ((form, sense.synset) for form in forms.split("; "))


def _trim(definition: str, rng: random.Random) -> str:
    """A gloss without remarks in brackets in front, mostly its first part only."""
    gloss = re.sub(r"^(\([^)]*\) *)+", "", definition)
    return gloss.split(";")[0].strip() if rng.random() < 0.75 else gloss


def _surname(name: str) -> str:
    last = name.rsplit(maxsplit=1)[-1]
    return name if last.isupper() or " the " in name else last


def _plural(name: str) -> str:
    if name.endswith("man"):
        return name[:-3] + "men"
    if re.search("[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name if name.endswith("s") else name + ("es" if re.search("(x|z|ch|sh)$", name) else "s")


def make_silver(wordnet: Path, texts: Iterable[str], n_records: int, seed: int) -> Iterator[SilverRecord]:
    """Make records that ask various types of various texts, in the shares of `KINDS`.

    wordnet (Path): The folder of WordNet 3.0's index.noun, data.noun and so on.
    texts (Iterable[str]): More texts to ask about, of any domain; may be empty.
    n_records (int): How many records to make.
    seed (int): The same seed, WordNet and texts make the same records.
    RETURNS (Iterator[SilverRecord]): The records, one by one.
    RAISES: SamError S607 if there is no WordNet at `wordnet`, S606 if none of its texts makes a record.
    """
    return _draw(_Maker(WordNet(wordnet), list(texts), random.Random(seed)), n_records, wordnet)


def _draw(maker: _Maker, n_records: int, wordnet: Path) -> Iterator[SilverRecord]:
    for _ in range(n_records):
        make = maker.makers[maker.rng.choices(list(KINDS), list(KINDS.values()))[0]]
        record = next(filter(None, (make() for _ in range(MAX_TRIED))), None)
        if record is None:
            raise SamError("S606", names=wordnet, reason=f"of {MAX_TRIED} texts drawn, none has a type to ask")
        yield record


def make_copies(texts: Iterable[str], n_records: int, seed: int) -> Iterator[SilverRecord]:
    """Make records without entities, in which a new base learns to repeat a text (`prompts.InlineFormat`).

    texts (Iterable[str]): Texts of any domain, of which those of 3 to 60 words are used, all of them before one again.
    n_records (int): How many records to make.
    seed (int): The same seed and texts make the same records.
    RETURNS (Iterator[SilverRecord]): The records, one by one.
    RAISES: SamError S606 if no text is of 3 to 60 words.
    """
    split = (text.split() for text in texts)
    fitting = [" ".join(words) for words in split if len(words) in WORDS]
    if not fitting:
        raise SamError("S606", names="the texts", reason="none is of 3 to 60 words")
    rng = random.Random(seed)
    rounds = (rng.sample(fitting, len(fitting)) for _ in count())
    return (SilverRecord(text, (), ("text",)) for text in islice(chain.from_iterable(rounds), n_records))


def write_silver(records: Iterable[SilverRecord], path: Path) -> None:
    """Write records as JSONL: `{"text", "entities": [[start, end, label], ...], "labels": [...]}`."""
    with path.open("w", encoding="utf8") as file:
        for record in records:
            file.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")
