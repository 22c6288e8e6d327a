"""Write the demo's corpora: three source domains and one target that mixes two of them. Everything is made up here.

python scripts/make_demo_corpora.py assets/demo
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Set

SEED = 7
N_TRAIN, N_DEV, N_TARGET = 250, 40, 60
SLOT = re.compile(r"\{(\w+)\}")


class Domain(NamedTuple):
    """Sentence templates with slots; `words` holds a pattern list for each slot, `types` the slots that are entities."""

    types: Sequence[str]
    templates: Sequence[str]
    words: Dict[str, Sequence[str]]


def _list(text: str) -> List[str]:
    return text.split(", ")


SHARED = {
    "lead": ["", "", "", "", "On Monday ", "This spring ", "As usual, ", "In the end ", "Yesterday ", "Late at night "],
    "tail": [".", ".", ".", ".", " again.", " without delay.", ", they said.", " before noon.", " for the first time."],
    "first": _list(
        "Ada, Bram, Clio, Dario, Edda, Femi, Goran, Hana, Ivo, Jutta, Kofi, Lise, Mirko, Nuria, Oskar, "
        "Petra, Rune, Sanne, Tariq, Ulla, Viggo, Wanda, Yusuf, Zita"
    ),
    "last": _list(
        "Abara, Brandl, Corvo, Dahl, Espinel, Farkas, Gruber, Holt, Ilves, Jansky, Kolar, Lindqvist, Marsh, "
        "Novak, Okoro, Pellan, Quist, Rinaldi, Sorel, Tamm, Usher, Vance, Weir"
    ),
    "day": ["Tuesday", "Friday", "Sunday", "market day", "the first of May"],
    "number": ["two", "three", "five", "eight", "twelve", "thirty", "ninety"],
}
FOOD = _list(
    "leek, trout, lentil, pumpkin, barley, plum, mushroom, walnut, beetroot, chickpea, quince, spinach, "
    "rhubarb, onion, herring, almond, cabbage, apricot, potato, fennel"
)
COOKING = Domain(
    ["dish", "ingredient", "utensil", "cook"],
    [
        "{lead}{cook} made {dish} with {ingredient}{tail}",
        "{lead}the {dish} needs {ingredient} and {ingredient}{tail}",
        "Stir the {ingredient} in a {utensil} until it is brown.",
        "For {dish}, cut the {ingredient} thin and salt it well.",
        "{lead}{cook} served {dish} to {number} guests{tail}",
        "Put the {utensil} on the stove and melt the {ingredient}.",
        "{lead}a {utensil} is all you need for {dish}{tail}",
        "{cook} learned to make {dish} from {cook}.",
        "Add {ingredient}, {ingredient} and a little {ingredient} to the pot.",
        "{lead}the guests asked {cook} for more {dish}{tail}",
        "Leave the {ingredient} in water overnight and dry it with a cloth.",
        "Nobody cooks {dish} as well as {cook}.",
        "{lead}{cook} bought a new {utensil}{tail}",
        "The {dish} was too salty, but the {dish} was perfect.",
        "Heat the oven, grease the {utensil} and fill it with {dish}.",
        "There was no {ingredient} left, so {cook} used {ingredient}.",
        "Can you pass me the {utensil}?",
        "{dish} tastes best on {day}.",
        "Wash the {utensil} before you touch the {ingredient}.",
        "The kitchen closes at ten.",
        "{lead}the guests had to wait for {number} minutes{tail}",
        "Breakfast is free for children on {day}.",
    ],
    {
        "dish": _list(
            "{food} soup, {food} pie, {food} stew, {food} dumplings, {food} salad, roast {food}, "
            "{food} and {food} curry, {food} pancakes, grilled {food}, sweet {food} tart, {food} risotto"
        ),
        "ingredient": ["{kind} {stuff}", "{stuff}", "{stuff}"],
        "kind": ["brown", "dried", "fresh", "ground", "smoked", "pickled"],
        "stuff": _list(
            "butter, sugar, thyme, paprika, cream, flour, garlic, vinegar, honey, cumin, ginger, yeast, "
            "sour milk, olive oil, black pepper, sea salt, mustard, saffron, basil"
        ),
        "utensil": ["{made} {tool}", "{tool}", "{tool}"],
        "made": ["copper", "heavy", "wooden", "steel", "clay", "large"],
        "tool": ["pan", "whisk", "ladle", "grater", "kettle", "rolling pin", "sieve", "baking tray", "mortar", "wok"],
        "cook": ["{first} {last}", "{first} {last}", "Chef {last}"],
        "food": FOOD,
    },
)
SPORT = Domain(
    ["athlete", "team", "competition", "stadium"],
    [
        "{lead}{athlete} scored twice for {team}{tail}",
        "{lead}{team} beat {team} by {number} points{tail}",
        "{athlete} won the {competition} in front of a full house.",
        "{lead}{team} played at {stadium}{tail}",
        "{athlete} of {team} was injured at {stadium}.",
        "The final of the {competition} takes place at {stadium} on {day}.",
        "{lead}{team} signed {athlete}{tail}",
        "{athlete} and {athlete} will miss the {competition}.",
        "{team} have not lost at {stadium} for {number} years.",
        "Few expected {athlete} to run in the {competition}.",
        "{lead}the coach left {athlete} on the bench{tail}",
        "{team} qualified for the {competition} with {number} wins.",
        "Rain stopped the match between {team} and {team}.",
        "{lead}{stadium} was sold out{tail}",
        "After the {competition}, {athlete} thanked the fans.",
        "{athlete} set a record at the {competition} in {stadium}.",
        "The referee sent off {athlete} after {number} minutes.",
        "Fans of {team} sang until midnight.",
        "The tickets were gone within {number} minutes.",
        "Training starts again on {day}.",
        "{lead}the second half was much better{tail}",
    ],
    {
        "athlete": ["{first} {last}", "{first} {last}", "{last}"],
        "team": ["{town} {animal}", "{town} United", "{town} Rovers", "the {animal}", "SC {town}", "{town} Athletic"],
        "town": _list(
            "Brackley, Norwell, Ashgrove, Tillburg, Varnsdorf, Elmstead, Castrovia, Lunden, Perrin, Osterby, "
            "Halden, Mirova"
        ),
        "animal": ["Falcons", "Badgers", "Wolves", "Otters", "Stags", "Ravens", "Lynx", "Hornets"],
        "competition": ["{place} {cup}", "{place} {cup}", "{cup} of {town}"],
        "place": ["Alpine", "Northern", "National", "Winter", "Coastal", "Junior", "Golden"],
        "cup": ["Cup", "Marathon", "Championship", "League", "Open", "Masters", "Relay"],
        "stadium": ["{last} Park", "{town} Arena", "{town} Stadium", "{last} Field", "the {animal} Dome"],
    },
)
SHIPPING = Domain(
    ["ship", "port", "cargo", "company"],
    [
        "{lead}the {ship} left {port} with {cargo}{tail}",
        "{lead}the {ship} carried {cargo} from {port} to {port}{tail}",
        "{company} sold the {ship} to {company}.",
        "The {ship} is due in {port} on {day}.",
        "{lead}dockers in {port} unloaded {cargo}{tail}",
        "{company} ordered {number} vessels from a yard in {port}.",
        "The {ship} and the {ship} collided off {port}.",
        "{lead}{company} moved {cargo} by rail{tail}",
        "Customs in {port} stopped {cargo} for {company}.",
        "The captain of the {ship} asked for a pilot.",
        "Ice kept the {ship} in {port} for {number} days.",
        "{company} will ship {cargo} through {port}.",
        "{lead}a crane at {port} dropped {cargo}{tail}",
        "{port} handles more {cargo} than {port}.",
        "Since {day} the {ship} sails for {company}.",
        "Repairs on the {ship} cost {company} a fortune.",
        "A fire broke out on the {ship} near {port}.",
        "{company} closed its office in {port}.",
        "The fog lifted after {number} hours.",
        "{lead}freight rates fell{tail}",
        "The crew was paid on {day}.",
    ],
    {
        "ship": ["MV {star} {wind}", "{star} {wind}", "{star} {wind}", "MS {first}"],
        "star": ["Northern", "Silver", "Baltic", "Ocean", "Crimson", "Polar", "Morning", "Atlantic", "Amber"],
        "wind": ["Star", "Wind", "Pearl", "Trader", "Spirit", "Queen", "Breeze", "Pioneer"],
        "port": ["Port {saint}", "{saint} Harbour", "{coast}haven", "{coast}mouth", "{coast}vik", "{coast}sund"],
        "saint": ["Adela", "Boniface", "Cyril", "Dunstan", "Elmo", "Florian", "Gallus"],
        "coast": ["Grim", "Whit", "Sand", "Kalm", "Brem", "Lar", "Hels", "Dun", "Osk", "Vester"],
        "cargo": ["{number} tonnes of {goods}", "{goods}", "{goods}", "{number} containers of {goods}"],
        "goods": _list(
            "timber, iron ore, bananas, grain, crude oil, cement, car parts, fertiliser, coal, copper wire, "
            "paper rolls, frozen fish"
        ),
        "company": ["{last} Lines", "{last} Shipping", "{last} & {last}", "{star} Freight", "{last} Maritime"],
    },
)
GALLEY = Domain(
    ["dish", "ingredient", "port", "ship"],
    [
        "The cook of the {ship} is known for his {dish}.",
        "In {port} the crew of the {ship} ate {dish} every evening.",
        "When the {ship} reached {port}, there was no {ingredient} on board.",
        "Passengers on the {ship} may choose between {dish} and {dish}.",
        "The galley took {ingredient} and {ingredient} on board in {port}.",
        "At the harbour market of {port} you can buy {dish} from a boat.",
        "A storm threw the {dish} off the tables of the {ship}.",
        "The {ship} stayed a day longer in {port} because of the {dish}.",
        "Sailors in {port} eat their {dish} with {ingredient}.",
        "Between {port} and {port} nobody wanted any {dish}.",
        "The captain's {dish} had too much {ingredient} in it.",
        "Every Sunday the {ship} smells of {dish} and {ingredient}.",
        "The festival in {port} begins with {dish} on the deck of the {ship}.",
        "Bring {ingredient} to {port}, or there will be no {dish}.",
        "The mess was empty and the stove was cold.",
        "The crew slept until the next tide.",
    ],
    {**COOKING.words, **SHIPPING.words, "food": [*FOOD, "salmon", "celery", "cherry"]},
)
SOURCES = {"cooking": COOKING, "sport": SPORT, "shipping": SHIPPING}
TARGET = "galley"


def make_sentence(domain: Domain, rng: random.Random) -> dict:
    """One sentence with its entities, as a row of JSONL."""
    words = {**SHARED, **domain.words}
    text = ""
    entities: List[list] = []
    position = 0
    template = rng.choice(domain.templates)
    for match in SLOT.finditer(template):
        text += template[position : match.start()]
        position = match.end()
        surface = _fill(f"{{{match[1]}}}", words, rng)
        if not text:
            surface = surface[:1].upper() + surface[1:]
        if match[1] in domain.types:
            entities.append([len(text), len(text) + len(surface), match[1]])
        text += surface
    text += template[position:]
    return {"text": text[:1].upper() + text[1:], "entities": entities}


def _fill(pattern: str, words: Dict[str, Sequence[str]], rng: random.Random) -> str:
    return SLOT.sub(lambda match: _fill(rng.choice(words[match[1]]), words, rng), pattern)


def make_rows(domain: Domain, n_rows: int, rng: random.Random) -> List[dict]:
    """Different sentences, in random order."""
    seen: Set[str] = set()
    rows: List[dict] = []
    for _ in range(100 * n_rows):
        row = make_sentence(domain, rng)
        if row["text"] not in seen and len(rows) < n_rows:
            seen.add(row["text"])
            rows.append(row)
    return rows


def write_corpora(out: Path, seed: int = SEED) -> List[Path]:
    """Write all corpora; the same seed gives the same files. RETURNS (List[Path]): What was written."""
    out.mkdir(parents=True, exist_ok=True)
    files: Dict[str, List[dict]] = {}
    for name, domain in SOURCES.items():
        rows = make_rows(domain, N_TRAIN + N_DEV, random.Random(f"{seed} {name}"))
        files[f"{name}.train.jsonl"], files[f"{name}.dev.jsonl"] = rows[:N_TRAIN], rows[N_TRAIN:]
    files[f"{TARGET}.test.jsonl"] = make_rows(GALLEY, N_TARGET, random.Random(f"{seed} {TARGET}"))
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / name).write_text(lines, encoding="utf8", newline="\n")
    return [out / name for name in files]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the corpora")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    for file in write_corpora(options.out, options.seed):
        print(file)
