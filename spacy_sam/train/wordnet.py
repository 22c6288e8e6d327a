"""WordNet's nouns, and finding them in texts.

WordNet's files are those of Princeton WordNet 3.0 (Debian: `wordnet-base`). A word is taken for a mention of a type only if
all its likely senses fall under it.
"""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ..errors import SamError


def listed(block: str, separator: Optional[str] = None) -> List[str]:
    """The words of a block of text, or what stands between its separators."""
    return [word.strip() for word in block.split(separator)]


def _pairs(block: str) -> List[List[str]]:
    return [listed(pair, "/") for pair in listed(block)]


DOUBT = 0.12  # the share of uses from which a sense is likely
EMPTY: FrozenSet[int] = frozenset()
TOKEN = re.compile(r"[^\W_]+(?:['’](?!s\b)[^\W_]+)*(?:-[^\W_]+(?:['’](?!s\b)[^\W_]+)*)*")
COUNTED = ("noun", "verb", "adj", "adv")
PLURALS = _pairs("s/ ses/s xes/x zes/z ches/ch shes/sh men/man ies/y")
ENDINGS = {"verb": _pairs("s/ ies/y es/e es/ ed/e ed/ ing/e ing/"), "adj": _pairs("er/ est/ er/e est/e"), "adv": []}
RUDE = re.compile(r"slur|offensive|obscen|disparag|vulgar|derogat|sexual|prostitut|insult")
CLOSED = set(
    listed("""
a an the this that these those some any no every each either neither both all much many more most few little less
least several such same other another own enough i me my mine myself you your yours yourself he him his himself she
her hers herself it its itself we us our ours ourselves they them their theirs themselves who whom whose which what
when where why how whoever whatever in on at by for from of off to into onto with without within about above across
after against along among around as before behind below beneath beside besides between beyond despite down during
except inside like near outside over past per since than through throughout till toward towards under until unto up
upon via and or but nor so yet if because although though while whereas whether unless am is are was were be been
being have has had having do does did doing done will would shall should can could may might must ought not only
also too very then there here now just even still ever never again away out back once twice always often yes someone
somebody anyone anybody everyone everybody nobody s t re
ll ve d m don didn doesn isn wasn won et al de la le von van der del di da el rt amp im its
""")
)


class Synset(NamedTuple):
    """A meaning: its words, the meanings above it, whether it is one named thing, and its gloss."""

    lemmas: Tuple[str, ...]
    parents: Tuple[int, ...]
    is_name: bool
    definition: str


class Sense(NamedTuple):
    """A word in one meaning: the synset, how often WordNet's tagged texts use it, and the word as it is spelt."""

    synset: int
    uses: int
    lemma: str


class Span(NamedTuple):
    """A word in a text: the types it is of, those it may be of, and whether it may be a name."""

    start: int
    end: int
    sure: FrozenSet[int]
    maybe: FrozenSet[int]
    is_name: bool


Found = Tuple[FrozenSet[int], FrozenSet[int], bool]  # what a word surely is, what it may be, whether it may be a name


class Reading(NamedTuple):
    """The known words of a text, and whether it has unknown words and unknown names."""

    spans: List[Span]
    unknown: bool
    unknown_name: bool


class WordNet:
    """The nouns of a WordNet folder, and what the other words can be."""

    def __init__(self, path: Path) -> None:
        """path: The folder with index.noun, data.noun and so on. RAISES: SamError S607 if it is not there."""
        if not (path / "data.noun").is_file() or not (path / "index.noun").is_file():
            raise SamError("S607", path=path)
        self.synsets: Dict[int, Synset] = {}
        self.examples: List[str] = []
        self.verbs: List[Tuple[str, str]] = []
        for pos in ("noun", "verb", "adj", "adv"):
            for line in _lines(path / f"data.{pos}"):
                self._add(pos, line)
        counts = _read_counts(path / "cntlist.rev")
        self.nouns: Dict[str, List[Sense]] = {}
        for line in _lines(path / "index.noun"):
            self._add_noun(line, counts["noun"])
        self.others: Dict[str, Dict[str, int]] = {}
        for pos in COUNTED[1:]:
            words = (line.split(" ", 1)[0] for line in _lines(path / f"index.{pos}"))
            known = self.others[pos] = {word.replace("_", " "): 0 for word in words}
            for (lemma, _), count in counts[pos].items():
                form = lemma.replace("_", " ")
                known[form] = known.get(form, 0) + count
        self.irregular = {pos: _read_exceptions(path / f"{pos}.exc") for pos in COUNTED}
        self.above: Dict[int, FrozenSet[int]] = {}
        for synset in self.synsets:
            self.types_of(synset)
        self.size = Counter(type_ for above in self.above.values() for type_ in above)
        lemmas = [*self.nouns, *(lemma for known in self.others.values() for lemma in known)]
        self.openings = {_opening(lemma) for lemma in lemmas if " " in lemma}

    def _add(self, pos: str, line: str) -> None:
        head, _, gloss = line.partition(" | ")
        if RUDE.search(gloss):
            gloss = ""
        fields = head.split(" ")
        n_lemmas = int(fields[3], 16)
        lemmas = tuple(lemma.replace("_", " ") for lemma in fields[4 : 4 + 2 * n_lemmas : 2])
        definition = re.split(r'[;:,]? *"', gloss)[0].strip(" ;:")
        self.examples += [" ".join(text.strip(" ;").split()) for text in re.findall(r'"([^"]+)"', gloss)]
        if pos == "noun":
            rest = fields[5 + 2 * n_lemmas :]
            pointers = list(zip(rest[::4], rest[1::4]))
            parents = tuple(int(target) for symbol, target in pointers if symbol in ("@", "@i"))
            self.synsets[int(fields[0])] = Synset(lemmas, parents, any(s == "@i" for s, _ in pointers), definition)
        elif pos == "verb" and definition:
            self.verbs.append((lemmas[0], definition))

    def _add_noun(self, line: str, counts: Dict[Tuple[str, int], int]) -> None:
        fields = line.split()
        senses = []
        for number, offset in enumerate(fields[-int(fields[2]) :], 1):
            spelt = [x for x in self.synsets[int(offset)].lemmas if x.lower().replace(" ", "_") == fields[0]]
            senses.append(Sense(int(offset), counts.get((fields[0], number), 0), spelt[0] if spelt else fields[0]))
        self.nouns[fields[0].replace("_", " ")] = senses

    def types_of(self, synset: int) -> FrozenSet[int]:
        """The synset and all above it."""
        if synset not in self.above:
            self.above[synset] = frozenset([synset]).union(*map(self.types_of, self.synsets[synset].parents))
        return self.above[synset]

    def senses(self, form: str) -> List[Sense]:
        """The senses of a noun in singular or plural, lower case; none if there is no such noun."""
        found = list(self.nouns.get(form, ()))
        for base in dict.fromkeys((*self.irregular["noun"].get(form, ()), *_strip(form, PLURALS))):
            found += self.nouns.get(base, ())
        return list({sense.synset: sense for sense in reversed(found)}.values())[::-1]

    def other_uses(self, form: str) -> Optional[float]:
        """How often a word is something other than a noun; None if it never is."""
        uses: List[float] = []
        for pos, known in self.others.items():
            bases = (*self.irregular[pos].get(form, ()), *_strip(form, ENDINGS[pos]))
            uses += [known[form]] if form in known else []
            uses += [known[base] / 4 for base in dict.fromkeys(bases) if base in known and base != form]
        return sum(uses) if uses else None


def _opening(words: str) -> str:
    first, _, rest = words.partition(" ")
    return f"{first} {rest[:2]}"


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf8") as file:
            yield from (line.rstrip("\n") for line in file if not line.startswith(" "))


def _strip(form: str, endings: Iterable[Sequence[str]]) -> Iterator[str]:
    if len(form) > 3 and not form.endswith("ss"):
        yield from (form[: -len(end)] + new for end, new in endings if form.endswith(end))


def _read_counts(path: Path) -> Dict[str, Dict[Tuple[str, int], int]]:
    counts: Dict[str, Dict[Tuple[str, int], int]] = {pos: {} for pos in COUNTED}
    for line in _lines(path):
        key, number, count = line.split()
        lemma, _, rest = key.partition("%")
        counts[{"1": "noun", "2": "verb", "4": "adv"}.get(rest[0], "adj")][lemma, int(number)] = int(count)
    return counts


def _read_exceptions(path: Path) -> Dict[str, List[str]]:
    rows = ([form.replace("_", " ") for form in line.split(" ")] for line in _lines(path))
    return {row[0]: row[1:] for row in rows}


class Reader:
    """Finds nouns in texts, and knows which types they are, may be, and are not."""

    def __init__(self, wordnet: WordNet) -> None:
        self.wordnet = wordnet
        self.person = next((sense.synset for sense in wordnet.nouns.get("person", ())), -1)
        named = {t for s, synset in wordnet.synsets.items() if synset.is_name for t in wordnet.above[s]}
        heads = ("person", "location", "organization", "social group", "name", "product")
        roots = {sense.synset for head in heads for sense in wordnet.nouns.get(head, ())[:1]}
        self.can_be_named = named | {s for s, above in wordnet.above.items() if above & roots}
        self.cache: Dict[Tuple[str, str], Optional[Found]] = {}

    def read(self, text: str, forced: Iterable[Span] = ()) -> Reading:
        """Find the nouns of a text.

        text (str): Any text.
        forced (Iterable[Span]): Spans of which it is known what they are; no others are looked for there.
        RETURNS (Reading): The spans, sorted and apart from each other.
        """
        spans = list(forced)
        inside = {i for span in spans for i in range(span.start, span.end)}
        tokens = [m for m in TOKEN.finditer(text) if m.start() not in inside and m.end() - 1 not in inside]
        is_cased = text != text.lower() and text != text.upper()
        unknown = unknown_name = False
        i = 0
        while i < len(tokens):
            length, found = self._longest(text, tokens[i : i + 4], is_cased)
            start, end = tokens[i].start(), tokens[i + length - 1].end()
            is_upper = is_cased and text[start].isupper()
            if found:
                sure, maybe, is_name = found
                if is_upper and _is_in_name(text, start, end):
                    sure, maybe, unknown_name = EMPTY, sure | maybe, True
                if sure or maybe:
                    spans.append(Span(start, end, sure, maybe, is_name))
                unknown_name |= is_upper and not is_name and not _starts_sentence(text, start)
            elif self._is_unknown(text[start:end]) or _is_handle(text, start):
                unknown |= not is_upper or not is_cased
                unknown_name |= is_upper or not is_cased or _is_handle(text, start)
            i += length
        return Reading(sorted(spans), unknown, unknown_name)

    def _longest(self, text: str, tokens: Sequence[re.Match], is_cased: bool) -> Tuple[int, Optional[Found]]:
        """How many of the tokens make the longest known word, and what it is."""
        is_open = (
            len(tokens) > 1 and _opening(text[tokens[0].start() : tokens[1].end()].lower()) in self.wordnet.openings
        )
        for n in range(len(tokens) if is_open else 1, 0, -1):
            start, end = tokens[0].start(), tokens[n - 1].end()
            if all(text[a.end() : b.start()] == " " for a, b in pairwise(tokens[:n])):
                found = self._look(text[start:end], _case(text, start, end) if is_cased else "any")
                if found or (n > 1 and self.wordnet.other_uses(text[start:end].lower()) is not None):
                    return n, found
        return 1, None

    def _look(self, surface: str, case: str) -> Optional[Found]:
        key = (surface, case)
        if key not in self.cache:
            self.cache[key] = self._interpret(surface, case)
        return self.cache[key]

    def _interpret(self, surface: str, case: str) -> Optional[Found]:
        """The types that a word surely is, those it may be besides, and whether it may be a name; None if it is no noun."""
        form = surface.lower()
        senses = [] if form in CLOSED or len(form) < 2 or not re.search("[a-z]", form) else self.wordnet.senses(form)
        if not senses and "-" in form:
            parts = [self._look(part, "any") for part in surface.split("-")]
            return EMPTY, EMPTY.union(*(part[0] | part[1] for part in parts if part)), False
        if not senses:
            return None
        chosen = senses if case == "any" else [x for x in senses if _is_spelt(x.lemma, surface, case)]
        other = self.wordnet.other_uses(form) if " " not in form else None
        total = sum(sense.uses + 1 for sense in senses)
        is_doubted = not chosen or (other is not None and (other + 1) / (other + 1 + total) >= DOUBT)
        if other is not None and total / (other + 1 + total) < DOUBT / 4:
            return EMPTY, EMPTY, False
        chosen = [x for x in chosen or senses if (x.uses + 1) / total >= DOUBT or len(senses) == 1] or senses[:2]
        types = [self.wordnet.types_of(sense.synset) for sense in chosen]
        names = [sense for sense in chosen if self.wordnet.synsets[sense.synset].is_name]
        if " " not in form:  # a surname by itself: others bear it
            is_doubted |= any(x.uses == 0 and self.person in self.wordnet.above[x.synset] for x in names)
        sure = EMPTY if is_doubted else types[0].intersection(*types)
        return sure, types[0].union(*types) - sure, bool(names)

    def _is_unknown(self, surface: str) -> bool:
        form = surface.lower()
        if re.split("['’]", form)[0] in CLOSED or surface.isdigit():
            return False
        return (len(form) > 2 or surface != form) and self.wordnet.other_uses(form) is None


def _starts_sentence(text: str, start: int) -> bool:
    return not text[:start].strip("\"'“‘( ") or text[:start].rstrip("\"'“‘( ")[-1] in ".!?:;|–—"


def _is_handle(text: str, start: int) -> bool:
    return start > 0 and text[start - 1] in "@#/&_"


def _case(text: str, start: int, end: int) -> str:
    if text[start:end].isupper() and end - start > 1:
        return "exact"
    if not text[start].isupper():
        return "lower"
    return "start" if _starts_sentence(text, start) else "name"


def _is_spelt(lemma: str, surface: str, case: str) -> bool:
    if case == "exact" or (len(lemma) > 1 and lemma.isupper()):
        return lemma == surface
    return case == "start" or (lemma != lemma.lower()) == (case == "name")


def _is_in_name(text: str, start: int, end: int) -> bool:
    """Whether a capitalised word has a capitalised neighbour that is not the article, or is joined to one by "of"."""
    before = re.search(r"(\w+)( of| for| and| &|-|\.|)[ ]$", text[:start])
    is_after = re.match(r"(?: (?:of |for |& )?|-|\. )[A-Z0-9]", text[end:]) is not None
    is_before = before is not None and before[1][0].isupper() and before[2] != "." and before[1].lower() not in CLOSED
    return is_after or (is_before and before is not None and before[2] != " and")
