"""The tables of silver records: fillers, patterns, templates, made names, and the types that are too vague to ask."""

import random
import re
from typing import Callable, Dict

from .wordnet import listed


def _date(rng: random.Random) -> str:
    day, number, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1700, 2029)
    month = MONTHS[number - 1]
    numeric = (f"{year}-{number:02}-{day:02}", f"{day:02}/{number:02}/{year}")
    return rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}", *numeric))


def _money(rng: random.Random) -> str:
    whole = rng.randint(1, 999)
    amount = rng.choice((f"{whole}", f"{whole}.{rng.randint(0, 99):02}", f"{whole},000"))
    return rng.choice(
        (f"${amount}", f"€{amount}", f"£{amount}", f"{amount} dollars", f"{amount} euros", f"${whole} million")
    )


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(("ba", "lo", "ne", "mar", "ti", "ko", "san", "vi", "ru", "del"), k=rng.randint(1, 3)))


def _pick(*forms: str) -> Callable[[random.Random], str]:
    return lambda rng: re.sub("W", lambda _: _word(rng), rng.choice(forms)).replace("N", str(rng.randint(2, 99)))


VAGUE = set(
    listed(
        """
entity|physical entity|abstraction|object|whole|living thing|psychological feature|causal agent|group|attribute|
matter|relation|thing|part|state|unit|district|administrative district|geographical area|geographic point|area|
territorial division|content|measure|instrumentality|act|biological group|taxonomic group|cognition|communication|
definite quantity|indefinite quantity|agent|fundamental quantity|happening|possession|physical condition|ill health|
pathological state|covering|creation|condition|change|property|quality|basic cognitive process|placental|creativity|
expressive style|transferred property|imagination|higher cognitive process|class|center|person of color|bad person|
unwelcome person|activity|action|event|artifact|process|way|position|point|kind|collection|speech act|group action|
magnitude relation|social control|body|one|set|natural object|belief|phenomenon|cognitive state|consumer goods|
commodity|information|physical phenomenon|magnitude|status|situation|support|restraint|indication|evidence|
representation|wilding|force|end|beginning
""",
        "|",
    )
)
MONTHS = listed("January February March April May June July August September October November December")
FILLERS: Dict[str, Callable[[random.Random], str]] = {
    "date": _date,
    "money": _money,
    "year": lambda rng: str(rng.randint(1700, 2029)),
    "number": lambda rng: str(rng.randint(2, 900)),
    "time": lambda rng: f"{rng.randint(1, 12)}:{rng.randint(0, 59):02}{rng.choice(('', ' am', ' pm', 'pm'))}",
    "percent": _pick("N%", "N %", "N percent", "N.5%", "N.25 percent"),
    "email": _pick("W.W@W.com", "W@W.org", "WN@W.net", "W.W@W.co.uk"),
    "url": _pick("http://W.com/W", "https://www.W.org/W", "www.W.com", "https://W.org/W-W"),
    "hashtag": _pick("#W", "#WW", "#WN"),
    "user": _pick("@W", "@W_", "@WN", "@W_W"),
}
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_DATE = rf"\b(?:\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}}, \d{{4}}|\d{{4}}-\d\d-\d\d|\d\d?/\d\d?/\d{{4}})(?!\w)"
_MONEY = rf"[$€£]{_NUMBER}(?: (?:m|b)illion)?(?!\w)|(?<![\w.,]){_NUMBER} (?:dollars|euros|pounds)\b"
PATTERNS = [
    (("number", "numeral", "number in digits"), re.compile(rf"(?<![\w.,/:#@+-]){_NUMBER}(?![\w%]|[.,/:-]\w)")),
    (("year", "four-digit year"), re.compile(r"(?<![\w.,/:#@$€£+-])(?:1[5-9]|20)\d\d(?![\w%]|[.,/:-]\d)")),
    (("capitalised word",), re.compile(r"(?<![\w'’@#/.-])[A-Z][a-z]+(?![\w'’/@-]|\.\w)")),
    (("capitalised phrase",), re.compile(r"(?<![\w'’@#/.-])[A-Z][\w'’-]*\w(?: [A-Z][\w'’-]*\w)+")),
    (("quotation", "quoted text"), re.compile(r'(?<=")[^"\s][^"]*[^"\s](?=")|(?<=“)[^“”]+(?=”)')),
    (("text in brackets", "words in parentheses"), re.compile(r"(?<=\()[^()\s][^()]*[^()\s](?=\))")),
    (("acronym",), re.compile(r"(?<![\w'’@#/.-])[A-Z]{2,5}(?![\w'’/@-])")),
    (("word in capitals",), re.compile(r"(?<![\w'’@#/.-])[A-Z]{2,}(?![\w'’/@-])")),
    (("hyphenated word", "word with a hyphen"), re.compile(r"(?<![\w@/.-])[A-Za-z]+(?:-[A-Za-z]+)+(?![\w@/-])")),
    (("word with digits",), re.compile(r"(?<![\w@#/.:-])(?=[a-z]*\d)(?=\d*[a-z])\w+(?![\w@/:-])", re.I)),
    (("email address", "e-mail"), re.compile(r"[\w.]+@\w+(?:\.\w+)+")),
    (("url", "web address", "link"), re.compile(r"(?:https?://|www\.)[^\s,)]*[\w/]")),
    (("hashtag",), re.compile(r"(?<!\w)#\w+")),
    (("user name", "user handle"), re.compile(r"(?<![\w.])@\w+")),
    (("time of day", "clock time"), re.compile(r"(?<![\w:.])\d{1,2}:\d\d(?: ?[ap]m)?(?![\w:])")),
    (("date", "calendar date"), re.compile(_DATE)),
    (("amount of money", "sum of money", "price"), re.compile(_MONEY)),
    (("percentage", "percent"), re.compile(rf"(?<![\w.,-]){_NUMBER} ?(?:%|percent\b|per cent\b)")),
]
TITLES = listed(
    "Saint St King Queen Lord Lady Sir Duke Duc President Pope Prince Princess Baron Count Marquis Marquise De"
)
MADE = {  # names after other names: the word that they are names of and the number of its sense, and their forms
    "organization": """
educational institution 1: University of {city}; {city} University; {person} College
financial institution 1: Bank of {country}; {city} Savings Bank
company 1: {person} Inc; {person} Ltd; {person} & Sons; {person} Motors
airline 2: {city} Airways; {country} Airlines
political party 1: Communist Party of {country}; {country} Labour Party
law enforcement agency 1: {city} Police Department
team 1: {city} United; {city} Rovers; FC {city}
orchestra 1: {city} Symphony Orchestra
court 1: Supreme Court of {country}; {city} District Court
foundation 3: {person} Foundation
legislature 1: Parliament of {country}""",
    "made": """
airport 1: {city} International Airport
street 1: {person} Street; {person} Avenue
bridge 1: {person} Bridge
lake 1: Lake {person}
mountain 1: Mount {person}
island 1: {person} Island
museum 1: {city} Museum
hotel 1: Hotel {city}
railway station 1: {city} Central Station
newspaper 1: {city} Times; {city} Gazette
legislative act 1: {person} Act of {year}; {country} Trade Act {year}
treaty 1: Treaty of {city}
award 2: {person} Prize
syndrome 2: {person} syndrome
disease 1: {person} disease
athletic contest 1: {city} Cup; {city} Marathon
battle 1: Siege of {city}""",
}
TEMPLATES = listed(
    """{any:told}, {gloss}. | {any:told}: {gloss} | {any:told} is {gloss}. | {any:told} ({gloss}) |
The {type} {any:told} is well known. | They spoke about the {type} {any:told} for hours. | {any}, {any} and {any} |
{any}; {any}; {any}; {any} | {any}, {any}, {any}, {any} and {any}. |
{any} and {any} were mentioned together with {any}. | See also {any}, {any}. | {person:told}, {gloss}. |
{person:told} was {gloss} | {person:told} - {gloss} | {person:told} ({year}-{year}): {gloss} |
It was {person:told}, {gloss}, who answered. | the {type} {person:told} died on {date} |
A letter from {person} to {person}, {date}. | {person} and {person} met in {city} in {year}. |
{person} left {city} for {city} after {number} days. | {person}, {person} and {person} have not replied yet. |
{person} beat {person} by {number} votes in {location}. | RT {user}: {person} is in {city} again {hashtag} |
{user} have you seen {person} yet? {url} | just landed in {city} {hashtag} | I love {city} so much more than {city} |
omg {person} and {person} in {city} !!! | {city}: {person} resigns over {organization} affair |
{person} joins {organization} | {organization} opens an office in {city}, {country} |
{organization} and {organization} reached an agreement worth {money}. |
{organization} said on {date} that its costs rose by {percent}. | {person} of {organization} wrote from {city}. |
{city} {date} | {country} {number}, {country} {number} | {country} and {country} sign treaty in {city} |
{country} beat {country} after {event} | cheap flights from {city} to {city} |
i need a flight from {city} to {city} leaving at {time} | show me hotels in {city} near {location} |
how far is {location} from {location} | how do i get to {city} from {city} by {time} |
weather in {location} on {date} | what is the capital of {country} | who was {person} | when did {event} happen |
book me a ticket to {city} for {date} please | is there any delay between {city} and {city} today |
The {river} flows past {city}. | The boundary between {country} and {country} follows the {river}. |
We crossed the {river} and drove on to {city}, {location}. |
From {location} they sailed to {location} by way of {body of water}. |
{body of water} lies between {location} and {location}. | After {event}, {person} returned to {city}. |
Before {event} nobody in {country} had heard of {person}. | {event} ended in {year}. |
The {made} and the {made} are named after them. | {made}, {made}, {city} | What do you know about {made} ? |
{person} wrote about {made} and {made} in {year}. | {organization} v. {organization} |
{organization} sues {organization} for {money} | {organization}, {organization} and {person} |
{organization} {number} {organization} {number} | {person} worked for {organization} and later for {organization}. |
In {year} {event} changed {country} for good. |
Judgment was given against {person} by the court at {city} on {date}. |
The agreement between {organization} and {person} is governed by the laws of {country}. | {person} v. {organization} |
The method of {person} and {person} was tested in {country}. |
Samples were collected near {location}, {country}, in {year}. |
Born in {city}, {country}, {person} moved to {city} in {year}. | {person} ({city}), {person} ({city}) |
1. {person} ({country}) 2. {person} ({country}) 3. {person} ({country}) | {number}. {person}, {city} |
{person} told {person} that {location} was lost.""",
    "|",
)
