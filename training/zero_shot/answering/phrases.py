"""Phrases of questions as expressions: nouns with what stands before and behind them, joined by `and` and `or`.

A phrase is understood whole or refused with the word that is in the way. Forms of questions are in grammar.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from graft_pipeline.errors import InputError
from training.zero_shot.answering.concepts import is_known, singular
from training.zero_shot.answering.language import MAX_NUMBER

#: Things that one question names together, phrases that one thing may have behind it.
_MAX_THINGS, _MAX_MODIFIERS = 4, 3


class NotUnderstoodError(InputError):
    """A question is of no known form, or could mean several things; the message names the word."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ADJECTIVES = {
    "small": "small", "little": "small", "tiny": "small",
    "medium": "medium", "medium-sized": "medium", "medium sized": "medium",
    "large": "large", "big": "large", "huge": "large",
    "square": "square", "rectangular": "rectangular", "circular": "circular", "round": "circular",
}  # fmt: skip
_SUPERLATIVES = {"largest": "largest", "biggest": "largest", "smallest": "smallest"}
#: Say what a building or an area is for, and name no thing by themselves.
_PURPOSES = _words("""
    residential commercial industrial agricultural military religious recreational public private urban rural
""")
_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred")
NUMBERS = {word: value for value, word in enumerate(_NUMBER_WORDS)} | {
    word: 10 * tens for tens, word in enumerate(_TENS, start=2)
}
#: Square metres and metres in one of each unit.
AREA_UNITS = {
    r"m2|sqm|sq\.? ?m|square met(?:re|er)s?": 1.0, r"ha|hectares?": 1e4, r"km2|square kilomet(?:re|er)s?": 1e6,
    r"acres?": 4046.8564224, r"square miles?": 2589988.110336, r"square (?:feet|foot)|sq\.? ?ft": 0.09290304,
}  # fmt: skip
_LENGTH_UNITS = {
    r"m|met(?:re|er)s?": 1.0, r"km|kilomet(?:re|er)s?": 1e3, r"miles?": 1609.344, r"feet|foot|ft": 0.3048,
    r"yards?": 0.9144,
}  # fmt: skip
#: Directions; no name of a thing holds them.
_POSITIONS = (
    "north east south west north-east north-west south-east south-west left right top bottom upper lower"
)
#: No name of a thing holds these either: the question is of another form.
_NO_NOUN = _words(f"""
    {_POSITIONS} a an the any some this that these those it its they them their there here he she we you i me my
    our your one ones who whom whose what which why when where how is are was were be been being am do does did
    done can could will would shall should may might must have has had having get make lie lies located situated
    found seen visible shown present covers covered contain contains and or nor but not no if than then as for
    from to of at by with without about above across after against among around before behind below beneath beside
    besides between beyond during except into like off onto opposite out outside over past per through throughout
    toward towards under underneath until up upon via within inside in on near next along all every each either
    neither both half many much more most less least fewer few fewest several multiple couple dozen dozens pair
    enough number amount count total percent percentage share m m2 km km2 sqm ha hectare hectares acre acres metre
    metres meter meters kilometre kilometres kilometer kilometers mile miles feet ft larger bigger smaller greater
    higher lower longer shorter wider closer nearer further farther older newer first second third last same equal
    other another else such so too very quite just only also ever even still now away apart far nearby close sight
    together everywhere anywhere somewhere nowhere almost maybe perhaps chance please image picture photo
    import while def return lambda
""") | set(NUMBERS)
#: These name no thing when they stand alone: `area`, but `residential area`.
_NO_THING = _words("""
    scene map chip tile view area part place thing things anything something object objects
    corner edge side middle center centre half third quarter land ground lot kind type size shape colour color
""")
#: Words that only look like a plural, a superlative, an adverb or a verb.
_PLURAL_LOOKS = frozenset(("sports", "goods", "christmas", "works"))
_SUPERLATIVE_LOOKS = re.compile(
    r"(?:forest|chest|crest|nest|guest|harvest|pest|quest|test|vest|west|midwest)$"
)
_ADVERB_LOOKS = frozenset(("family", "assembly", "supply", "butterfly", "monopoly"))
_VERB_LOOKS = re.compile(
    r"(?:building|parking|housing|crossing|landing|clearing|dwelling|mooring|ring|wing|spring|railing|fencing|planting|"
    r"shed|bed|reed|feed|weed|seed)$"
)
#: Nouns of several words around `of`.
_OF = re.compile(r"(?:(?:body|bodies) of water|places? of worship)")
_WORD = re.compile(r"[a-z][a-z'-]*")
_MAX_WORDS = 5

IMAGE = r"(?:(?:the|this|that) )?(?:satellite |aerial )?(?:image|picture|photo|scene|map|chip|tile|view)"
#: Not `in the north of`, which is within it.
_TO_SIDE = r"(?:(?:at|on|to) )?(?:the )?"
_OF_SIDE = r"(?:-hand)?(?: side)? of"
#: Phrases between two things.
_RELATIONS = {
    "north_of": rf"{_TO_SIDE}(?:top|north){_OF_SIDE}|above",
    "south_of": rf"{_TO_SIDE}(?:bottom|south){_OF_SIDE}|below|beneath",
    "west_of": rf"{_TO_SIDE}(?:left|west){_OF_SIDE}",
    "east_of": rf"{_TO_SIDE}(?:right|east){_OF_SIDE}",
    "nearest": r"(?:nearest|closest) to",
    "near": r"(?:right )?next to|near to|near|close to|(?:right )?beside|adjacent to|along|bordering|touching|by",
    "inside": r"inside(?: of)?|within|surrounded by|enclosed by|in|on",
}
_CORNER = re.compile(rf"{_TO_SIDE}(?P<corner>(?:north|south)-(?:east|west)){_OF_SIDE} (?=the )")
_RELATION = re.compile(
    "(?:" + "|".join(f"(?P<{name}>{phrase})" for name, phrase in _RELATIONS.items()) + r") (?=[\w])"
)


def _units(of: dict[str, float]) -> str:
    return "|".join(of)


VALUE = rf"(?P<value>\d{{1,9}}(?:\.\d{{1,3}})?|half an?|an?|{'|'.join(NUMBERS)})"
_CLOSE = re.compile(
    rf"(?:within|at most|not more than|no more than|less than|closer than|up to) {VALUE} ?"
    rf"(?P<unit>{_units(_LENGTH_UNITS)})(?: away)? (?:of|from|to) "
)
_FAR = re.compile(
    r"(?:at least|more than|over|further than|farther than) "
    rf"{VALUE} ?(?P<unit>{_units(_LENGTH_UNITS)})(?: away)? from "
)
_SIZE = re.compile(
    r"(?:with an area )?(?:of |covering )?(?:(?P<least>larger than|bigger than|greater than|more than|over|at least)|"
    r"smaller than|less than|under|at most) "
    rf"{VALUE} ?(?P<unit>{_units(AREA_UNITS)})(?: in (?:size|area))?(?= |$)"
)
_PART = re.compile(
    r"(?:in|on|at|to|towards?) the (?:(?P<down>north|top|upper|south|bottom|lower)?[- ]?"
    r"(?P<along>east|right|west|left)?(?:-hand)?|(?P<center>center|centre|middle|central))"
    rf"(?: (?:part|half|corner|side))?(?: of {IMAGE})?(?!(?: (?:part|half|corner|side))? of\b)(?= |$)"
)
_SIDES = {
    "top": "north", "upper": "north", "bottom": "south", "lower": "south", "left": "west", "right": "east",
}  # fmt: skip
_HERE = re.compile(rf"(?:(?:visible |shown )?(?:in|on) {IMAGE}|here|in this area)(?= |$)")
#: What may stand between a thing and a phrase; with `are` alone the phrase belongs to the first thing of the question.
_LINK = re.compile(
    r"(?:(?P<that>(?:that|which) (?:is|are|lie|lies) )|(?P<main>(?:is|are|lie|lies) ))?"
    r"(?:there )?(?:located |situated )?"
)
_NOT = re.compile(r"not ")
_STARTS = re.compile(
    _LINK.pattern.replace("?P<that>", "?:").replace("?P<main>", "?:")
    + "(?:not )?(?:"
    + "|".join(
        re.sub(r"\?P<\w+>", "?:", of.pattern)
        for of in (_HERE, _PART, _SIZE, _CLOSE, _FAR, _CORNER, _RELATION)
    )
    + ")"
)
_JOINT = re.compile(r"(?:, )?(and|or) |, ")
_AND_MODIFIER = re.compile(r"(?:, )?and |, ")
_DETERMINER = re.compile(r"(an?|the|any|some) ")
_ADJECTIVE = re.compile(rf"({'|'.join(sorted((*_ADJECTIVES, *_SUPERLATIVES), key=len, reverse=True))}) ")


def refused(word: str, instead: str = "leave it out, or put it in other words") -> NotUnderstoodError:
    """The error for a word.

    Args:
        word: as the question has it.
        instead: what to do about it.

    Returns:
        To be raised.
    """
    return NotUnderstoodError(f"{word!r} is not understood there: {instead}.")


def quantity(found: re.Match[str], units: dict[str, float]) -> str:
    """A number with its unit in square metres or metres, as a program writes it.

    Args:
        found: a match with groups `value` and `unit`.
        units: AREA_UNITS, or those of lengths.

    Raises:
        NotUnderstoodError: if it is larger than numbers of programs are.
    """
    written = found["value"]
    value = {"a": 1.0, "an": 1.0, "half a": 0.5, "half an": 0.5} | {
        name: float(of) for name, of in NUMBERS.items()
    }
    number = value[written] if written in value else float(written)
    factor = next(of for unit, of in units.items() if re.fullmatch(unit, found["unit"]))
    return digits(number * factor, found[0].strip())


def digits(number: float, written: str) -> str:
    """A number as a program writes it.

    Args:
        number: at least 0.
        written: as the question has it.

    Raises:
        NotUnderstoodError: if it is larger than numbers of programs are.
    """
    if number > MAX_NUMBER:
        raise refused(written, "name a smaller number")
    return f"{number:.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Modifier:
    """A phrase behind a thing: name of its operation, and what it makes of the thing's expression."""

    kind: str
    write: Callable[[str], str]


@dataclass(frozen=True)
class Thing:
    """A noun with what stands before and behind it."""

    determiner: str
    noun: str
    adjectives: tuple[str, ...]
    superlatives: tuple[str, ...]
    modifiers: tuple[Modifier, ...] = field(default=())

    @property
    def is_plural(self) -> bool:
        """Whether it is named in the plural."""
        return singular(self.noun) != self.noun

    def is_like(self, other: "Thing") -> bool:
        """Whether both are named in one manner: `the lake and the road`, `lakes and roads`."""
        return self.determiner == other.determiner and (
            bool(self.determiner) or self.is_plural == other.is_plural
        )

    def program(self, *, is_subject: bool = False) -> str:
        """Its expression; the last phrase behind a subject is what is asked about it, and does not help to choose."""
        made = f'find("{singular(self.noun)}")'
        for adjective in reversed(self.adjectives):
            made = f"{adjective}({made})"
        choosing = self.modifiers[:-1] if is_subject else self.modifiers
        for modifier in choosing:
            made = modifier.write(made)
        # Of those in the north the largest, not the largest if it is in the north.
        for superlative in reversed(self.superlatives):
            made = f"{superlative}({made})"
        return self.modifiers[-1].write(made) if is_subject and self.modifiers else made


@dataclass(frozen=True)
class Things:
    """Things joined by `and` or `or`."""

    each: tuple[Thing, ...]
    joint: str = ""

    def program(self) -> str:
        """The expression for all of them together."""
        return united([of.program() for of in self.each])


def united(programs: list[str]) -> str:
    """The expression for objects of several expressions, each object once.

    Args:
        programs: at least one.
    """
    made = programs[0]
    for other in programs[1:]:
        made = f"union({made}, {other})"
    return made


class Reader:
    """Reads a phrase from left to right.

    A phrase belongs to the thing that it stands behind; behind `and` or `are`, to the first one. What could be read in
    two ways is refused, not guessed.

    Args:
        phrase: in lower case, with one space between words and around commas.
    """

    def __init__(self, phrase: str) -> None:
        self._rest = phrase.strip(" ,")

    def things(self, *, is_subject: bool = False) -> Things:
        """The whole phrase as things.

        Args:
            is_subject: whether what stands behind a thing is asked about it.

        Raises:
            NotUnderstoodError: if a word is in the way.
        """
        each, joint = [self._thing(is_closed=is_subject)], ""
        while found := self._take(_JOINT):
            if found[1] and joint not in ("", found[1]):
                raise refused(found[1], "join things by 'and' alone, or by 'or' alone")
            joint = found[1] or joint
            each.append(self._thing(is_closed=is_subject))
        if self._rest or len(each) > _MAX_THINGS or (len(each) > 1 and not joint):
            raise refused(self._rest.split(" ")[0] if self._rest else each[-1].noun)
        return Things(tuple(_shared(each)), joint)

    def like(self, model: Thing) -> Thing:
        """The phrase as one about a thing that was named before: `in the south`, after `houses in the north`.

        Args:
            model: that thing.

        Raises:
            NotUnderstoodError: if it does not say of it what was said before.
        """
        modifier = self._modifier(model, is_inner=False, is_closed=True)
        if modifier is None or self._rest:
            raise refused(self._rest.split(" ")[0])
        if [of.kind for of in model.modifiers] != [modifier.kind]:
            raise refused(self._rest or "than", "name both things in full")
        return replace(model, modifiers=(modifier,))

    @property
    def starts_with_modifier(self) -> bool:
        """Whether what is left begins with a phrase such as `north of the lake`, not with a thing."""
        return _STARTS.match(self._rest) is not None

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._rest)
        if found:
            self._rest = self._rest[found.end() :].lstrip()
        return found

    def _thing(self, *, is_inner: bool = False, is_closed: bool = False) -> Thing:
        found = self._take(_DETERMINER)
        article = found[1] if found else ""
        before: list[str] = []
        while found := self._take(_ADJECTIVE):
            before.append(found[1])
        words: list[str] = []
        while self._rest and not _JOINT.match(self._rest) and not self.starts_with_modifier:
            word, _, self._rest = self._rest.partition(" ")
            words.append(word)
        if not words:
            raise refused(before[-1] if before else self._rest.split(" ")[0], "name a thing with it")
        noun = _noun(words)
        if noun in _PURPOSES and (is_inner or not _JOINT.match(self._rest)):
            raise refused(noun, "name a thing with it")
        thing = Thing(
            {"an": "a"}.get(article, article),
            noun,
            tuple(_ADJECTIVES[of] for of in before if of in _ADJECTIVES),
            tuple(_SUPERLATIVES[of] for of in before if of in _SUPERLATIVES),
        )
        while True:
            start = self._rest
            is_again = bool(thing.modifiers) and not is_inner
            if is_again and self._take(_AND_MODIFIER) and not self.starts_with_modifier:
                self._rest = start
            modifier = self._modifier(thing, is_inner=is_inner, is_closed=is_closed)
            if modifier is None:
                return thing
            if modifier.kind != "here":
                thing = replace(thing, modifiers=(*thing.modifiers, modifier))
            if len(thing.modifiers) > _MAX_MODIFIERS:
                raise refused(start.split(" ")[0], "say less of one thing")

    def _modifier(self, head: Thing, *, is_inner: bool, is_closed: bool) -> Modifier | None:
        """The next phrase that says something of a thing; None if none stands there."""
        if not self.starts_with_modifier:
            return None
        start = self._rest
        link = self._take(_LINK)
        if is_inner and link and link["main"]:
            # "houses near a lake are in the north": the houses are.
            self._rest = start
            return None
        is_closed = is_closed or bool(link and link["main"])
        is_not = self._take(_NOT) is not None
        if self._take(_HERE):
            if is_not:
                raise refused("not")
            return Modifier("here", str)
        if found := self._take(_PART):
            made = Modifier("in_part", _in_part(found))
        elif found := self._take(_SIZE):
            area = quantity(found, AREA_UNITS)
            sizes = f"{area}" if found["least"] else f"0, {area}"
            made = Modifier("sized", lambda objects: f"sized({objects}, {sizes})")
        else:
            made = self._relation(head, is_closed=is_closed, is_not=is_not)
        if not is_not:
            return made
        return Modifier(f"not {made.kind}", lambda objects: f"without({objects}, {made.write(objects)})")

    def _relation(self, head: Thing, *, is_closed: bool, is_not: bool) -> Modifier:
        start = self._rest
        if found := self._take(_CLOSE):
            name, form = "near", f"near({{0}}, {{1}}, {quantity(found, _LENGTH_UNITS)})"
        elif found := self._take(_FAR):
            name, form = "far", f"without({{0}}, near({{0}}, {{1}}, {quantity(found, _LENGTH_UNITS)}))"
        elif found := self._take(_CORNER):
            down, along = found["corner"].split("-")
            name, form = "corner", f"{down}_of({along}_of({{0}}, {{1}}), {{1}})"
        elif found := self._take(_RELATION):
            name = next(of for of in _RELATIONS if found[of])
            form = f"{name}({{0}}, {{1}})"
        else:
            raise refused(start.split(" ")[0])
        others, joint = self._others(head, is_closed=is_closed)
        programs = [of.program() for of in others]
        if joint == "or":
            programs = [united(programs)]
        elif joint == "and" and (is_not or name in ("inside", "far", "nearest")):
            raise refused("and", "ask for one of them at a time")

        def write(objects: str) -> str:
            for other in programs:
                objects = form.format(objects, other)
            return objects

        return Modifier(name, write)

    def _others(self, head: Thing, *, is_closed: bool) -> tuple[list[Thing], str]:
        """What a relation is to; what is joined to it may as well be joined to the head: their articles tell."""
        others, joint = [self._thing(is_inner=True)], ""
        while found := _JOINT.match(self._rest):
            start = self._rest
            self._take(_JOINT)
            if self.starts_with_modifier:
                self._rest = start
                break
            following = self._thing(is_inner=True)
            word = found[1] or joint
            is_ours = following.is_like(others[0]) or (
                not following.determiner and not following.is_plural and not others[0].is_plural
            )
            is_heads = following.is_like(head) and not is_closed
            if is_heads and not is_ours and following.modifiers:
                self._rest = start
                break
            # "near lakes and ponds" may be near either; "a house near a lake and a road", or "a house ... and a road".
            is_vague = word == "and" and following.is_plural and not following.determiner
            is_either = is_heads and (word == "and" or following.modifiers)
            if not is_ours or is_vague or is_either or not word or joint not in ("", word):
                raise refused(
                    found[1] or ",", "it can join several things here; ask about one of them at a time"
                )
            joint = word
            others.append(following)
        return others, joint


def _shared(each: list[Thing]) -> list[Thing]:
    """Things, each with what is said of both: `residential and commercial buildings`, `lakes and ponds near a road`."""
    made = [each[-1]]
    for thing in each[-2::-1]:
        following = made[0]
        is_bare = not (following.determiner or following.adjectives or following.superlatives)
        if is_bare and (thing.adjectives or thing.superlatives):
            raise refused("and", "say of each thing how large it is, or ask about one of them at a time")
        if thing.noun in _PURPOSES and is_bare and " " in following.noun:
            thing = replace(thing, noun=f"{thing.noun} {following.noun.split()[-1]}")
        elif is_bare and not thing.is_plural and (following.is_plural or " " in following.noun):
            # "wooden and metal roofs" are no "wooden"; "forest and lakes" is a forest.
            if not is_known(thing.noun):
                raise refused(thing.noun, "name a thing with it")
        elif thing.noun in _PURPOSES:
            raise refused(thing.noun, "name a thing with it")
        if not thing.modifiers:
            thing = replace(thing, modifiers=following.modifiers)
        made.insert(0, thing)
    return made


def _is_plural(word: str) -> bool:
    return singular(word) != word and word not in _PLURAL_LOOKS


def _noun(words: list[str]) -> str:
    """Words as the name of a thing; what stands behind a plural is another word, such as a verb."""
    whole = " ".join(words)
    if _OF.fullmatch(whole):
        of = words.index("of")
        return " ".join((*words[: of - 1], singular(words[of - 1]), *words[of:]))
    for number, word in enumerate(words):
        is_last = number == len(words) - 1
        is_odd = (
            not _WORD.fullmatch(word)
            or word in _NO_NOUN
            or bool(set(word.split("-")) & set(NUMBERS))
            or (word in _ADJECTIVES and not (word == "square" and is_last))
            or (word in _PURPOSES and is_last and number > 0)
            or word in _SUPERLATIVES
            or (word.endswith("est") and not _SUPERLATIVE_LOOKS.search(word))
            or (word.endswith("ly") and word not in _ADVERB_LOOKS)
            or (number > 0 and _is_plural(words[number - 1]))
            or (number > 0 and is_last and word.endswith(("ing", "ed")) and not _VERB_LOOKS.search(word))
        )
        if is_odd:
            raise refused(f"{words[number - 1]} of" if word == "of" and number else word)
    if whole in _NO_THING or len(words) > _MAX_WORDS:
        raise refused(whole, "name a thing, such as a lake")
    return whole


def _in_part(found: re.Match[str]) -> Callable[[str], str]:
    names = ("center",) if found["center"] else (found["down"], found["along"])
    part = "-".join(_SIDES.get(of, of) for of in names if of)
    if not part:
        raise refused(found[0])
    return lambda objects: f'in_part({objects}, "{part}")'
