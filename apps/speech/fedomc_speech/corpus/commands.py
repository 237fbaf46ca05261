"""The corpus ``commands``: spelled names, numbers, dates and commands as in AN4, in synthetic voices.

Its vocabulary is that of AN4, so that a model trained on one can be trained further on the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from fedomc_speech.corpus.synthetic import SyntheticConfig

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
DIGITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOUGHTS = ("zero", "oh")
TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
    *("eleventh", "twelfth", "fifteenth", "sixteenth", "eighteenth", "twentieth", "thirtieth"),
)
COMMANDS = ("enter", "erase", "go", "help", "no", "repeat", "rubout", "start", "stop", "yes")
OTHERS = ("and", "apostrophe", "area", "code", "half", "hundred", "of", "thousand")

NAMES = (
    *("adam", "agnes", "alice", "amanda", "andrew", "anthony", "barbara", "bernard", "brian", "bruce", "carol"),
    *("charles", "cynthia", "daniel", "deborah", "dennis", "donald", "edith", "eleanor", "eric", "eugene", "evelyn"),
    *("felix", "frances", "frank", "gary", "george", "grace", "gregory", "harold", "helen", "henry", "hugh", "irene"),
    *("jack", "james", "jessica", "joan", "joseph", "judith", "julia", "keith", "kenneth", "kevin", "larry", "laura"),
    *("lloyd", "louis", "lucy", "margaret", "martin", "michael", "monica", "nancy", "nathan", "oliver", "oscar"),
    *("patricia", "paul", "peggy", "philip", "rachel", "ralph", "raymond", "rebecca", "robert", "roger", "ruth"),
    *("samuel", "sandra", "sophie", "stanley", "stephen", "susan", "sylvia", "theresa", "thomas", "ursula", "victor"),
    *("vincent", "virginia", "walter", "wendy", "william", "xavier", "yvonne", "zachary", "zoe", "allen", "baker"),
    *("becker", "bradley", "brown", "campbell", "chambers", "clark", "cooper", "crawford", "davis", "dixon", "evans"),
    *("fitzgerald", "fletcher", "fox", "gallagher", "gomez", "griffith", "hawkins", "hughes", "jackson", "jefferson"),
    *("johnson", "kaufman", "kowalski", "lambert", "lopez", "mackenzie", "maxwell", "mitchell", "murphy", "newman"),
    *("obrien", "parker", "perkins", "quigley", "quinn", "ramirez", "russell", "schultz", "schwartz", "simpson"),
    *("spencer", "sullivan", "swift", "taylor", "turner", "vasquez", "wagner", "washington", "webb", "wheeler"),
    *("young", "zimmerman", "boston", "buffalo", "chicago", "cleveland", "columbus", "denver", "detroit", "erie"),
    *("hartford", "houston", "kansas", "lexington", "memphis", "milwaukee", "oakland", "phoenix", "pittsburgh"),
    *("portland", "queens", "richmond", "seattle", "syracuse", "tucson", "wheeling", "york", "avenue", "beacon"),
    *("boulevard", "bridge", "broadway", "cedar", "center", "church", "college", "drive", "elm", "fifth", "forbes"),
    *("franklin", "garden", "grove", "highland", "hill", "jay", "lake", "lane", "liberty", "main", "maple", "market"),
    *("oak", "park", "pine", "place", "road", "school", "spring", "square", "street", "terrace", "valley", "walnut"),
)
"""Names of people, towns and streets, to be spelled."""


@dataclass(frozen=True)
class CommandsConfig(SyntheticConfig):
    """The configuration of ``commands``, whose utterances resemble AN4's."""

    name = "commands"
    version = 1
    words = (*LETTERS, *DIGITS, *NOUGHTS, *TEENS, *TENS, *MONTHS, *ORDINALS, *COMMANDS, *OTHERS)
    rates = (120, 220)
    pitches = (25, 75)
    spellings = MappingProxyType({"a": "eigh", "z": "zee"})  # it takes a for the article, and z differs by accent

    train_speakers: int = 40

    def sentence(self, random: Random) -> list[str]:
        """Draw the words of an utterance."""
        return random.choices(_SENTENCES, _WEIGHTS)[0](random)


def _spelled(random: Random) -> list[str]:
    word = list(random.choice(NAMES))
    if random.random() < 0.1:
        word.insert(random.randrange(1, len(word)), "apostrophe")
    return word


def _letters(random: Random) -> list[str]:
    return random.choices(LETTERS, k=random.randint(1, 7))


def _digits(random: Random) -> list[str]:
    nought = random.choice(NOUGHTS)
    return random.choices((*DIGITS, nought), k=random.randint(1, 10))


def _below_hundred(random: Random) -> list[str]:
    kind = random.randrange(4)
    if kind == 0:
        return [random.choice(TEENS)]
    return [random.choice(TENS), *([random.choice(DIGITS)] if kind > 1 else [])]


def _number(random: Random) -> list[str]:
    """A number as people say it, such as the one of a house."""
    kind = random.randrange(7)
    if kind == 0:
        return [random.choice(DIGITS)]
    if kind == 1:
        return _below_hundred(random)
    if kind == 2:
        return [random.choice(DIGITS), *_below_hundred(random)]
    if kind == 3:
        return [*_below_hundred(random), *_below_hundred(random)]
    if kind == 4:
        return [*_below_hundred(random), random.choice(NOUGHTS), random.choice(DIGITS)]
    rest = random.choice(([], _below_hundred(random), ["and", *_below_hundred(random)]))
    hundreds = [random.choice(DIGITS), "hundred", *rest]
    if kind == 5:
        return hundreds
    thousands = random.choice(([random.choice(DIGITS)], _below_hundred(random)))
    return [*thousands, "thousand", *random.choice(([], hundreds))]


def _address(random: Random) -> list[str]:
    half = ["and", "a", "half"] if random.random() < 0.1 else []
    return [*_number(random), *half, *_spelled(random)] if random.random() < 0.3 else [*_number(random), *half]


def _phone(random: Random) -> list[str]:
    number = random.choices((*DIGITS, random.choice(NOUGHTS)), k=7)
    area = random.choices(DIGITS, k=3)
    return random.choice((number, [*area, *number], ["area", "code", *area, *number]))


def _date(random: Random) -> list[str]:
    month = random.choice(MONTHS)
    ordinal = random.choice(([random.choice(ORDINALS)], [random.choice(TENS[:2]), random.choice(ORDINALS[:9])]))
    year = [*random.choice((["nineteen"], [])), random.choice(TENS), *random.choice(([], [random.choice(DIGITS)]))]
    number = random.choice(([random.choice(DIGITS)], _below_hundred(random)))
    orders = ([month, *ordinal], [*ordinal, "of", month], [month, *number], [*number, month], number + number)
    return [*random.choice(orders), *year]


def _command(random: Random) -> list[str]:
    return [random.choice(COMMANDS)]


def _entry(random: Random) -> list[str]:
    return ["enter", *_number(random)]


def _correction(random: Random) -> list[str]:
    start = random.choice(([], ["erase"], ["rubout"]))
    return [*start, *random.choices(LETTERS, k=random.randint(2, 5)), *_number(random)]


_SENTENCES: tuple[Callable[[Random], list[str]], ...] = (
    *(_spelled, _letters, _digits, _number, _address, _phone, _date, _command, _entry, _correction),
)
_WEIGHTS = (20, 10, 10, 5, 10, 5, 10, 10, 5, 15)
