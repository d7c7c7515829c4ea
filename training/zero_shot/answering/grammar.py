"""Programs for questions of known forms: RSVQA's templates, and the plain ways to ask for what the language can answer.

Needs no model and no network. What the operations mean is in language.py; a language model that writes programs for any
question is in writers.py.
"""

import re
from collections.abc import Callable

from training.zero_shot.answering.concepts import singular
from training.zero_shot.answering.language import PARTS

#: A longer question is of no known form.
_MAX_CHARACTERS = 300
#: Rural is what is built over on less than this share.
_URBAN_SHARE = 0.15

_ATTRIBUTES = {
    "small": "small", "little": "small", "tiny": "small",
    "medium": "medium", "medium-sized": "medium", "medium sized": "medium",
    "large": "large", "big": "large", "huge": "large",
    "square": "square", "rectangular": "rectangular", "circular": "circular", "round": "circular",
    "largest": "largest", "biggest": "largest", "smallest": "smallest",
}  # fmt: skip

_BE = r"(?:is|are|lie|lies|located|situated|there|that|which)"
_OF_SIDE = r"(?:side )?of"
#: Phrases between two things; the longest that matches counts.
_RELATIONS = {
    "north_of": rf"(?:at|on|to|in)?(?: the)? ?(?:top|north) {_OF_SIDE}|above",
    "south_of": rf"(?:at|on|to|in)?(?: the)? ?(?:bottom|south) {_OF_SIDE}|below|beneath",
    "west_of": rf"(?:at|on|to|in)?(?: the)? ?(?:left|left-hand|west) {_OF_SIDE}",
    "east_of": rf"(?:at|on|to|in)?(?: the)? ?(?:right|right-hand|east) {_OF_SIDE}",
    "nearest": r"(?:nearest|closest) to",
    "near": r"next to|near to|near|nearby|close to|beside|adjacent to|along|bordering|touching|by",
    "inside": r"inside(?: of)?|within|surrounded by|enclosed by|in|on",
}
_METRES = (
    r"(?:within|at most|less than|closer than) (?P<metres>\d{1,6}(?:\.\d{1,3})?) ?(?:m|metres?|meters?)"
    r"(?: (?:of|from|to|away from))?"
)
_RELATION = re.compile(
    rf"(?:\b{_BE} )*\b(?:(?P<close>{_METRES})|"
    + "|".join(f"(?P<{name}>{phrase})" for name, phrase in _RELATIONS.items())
    + r") (?=\w)"
)
#: The same within other patterns: without names.
_ANY_RELATION = re.sub(r"\?P<\w+>", "?:", _RELATION.pattern)
_IMAGE = r"(?:the |this )?(?:image|picture|photo|scene|map|chip|tile)"
_PART = re.compile(
    rf"(?:\b{_BE} )*\b(?:in|on|at) the (?P<part>(?:{'|'.join(PARTS)}|middle|centre|top|bottom|left|right|upper|lower)"
    rf"(?:[- ](?:{'|'.join(PARTS)}|left|right))?)(?:ern)?(?: (?:part|half|corner|side|edge))?(?: of {_IMAGE})?$"
)
_PART_NAMES = {
    "middle": "center", "centre": "center",
    "upper": "north", "lower": "south", "top": "north", "bottom": "south", "left": "west", "right": "east",
    "northwest": "north-west", "northeast": "north-east", "southwest": "south-west", "southeast": "south-east",
}  # fmt: skip
#: Words that no name of a thing contains: the question was cut at the wrong place, or is of another form.
_NO_NOUN = frozenset((
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "there", "than", "then", "how", "what", "which", "who",
    "why", "when", "where", "many", "much", "more", "less", "fewer", "number", "amount", "and", "or", "not", "no", "if",
    "do", "does", "did", "can", "could", "will", "would", "have", "has", "had", "it", "this", "that", "these",
    "those", "me", "you", "i", "we", "they", "as", "for", "with", "without", "at", "to", "from", "all", "every",
    "each", "most", "same", "equal", "other", "another", "between", "both", "import", "while", "def", "return",
))  # fmt: skip
_NOUN = re.compile(r"[a-z][a-z'-]*(?: [a-z][a-z'-]*){0,4}")


def write_program(question: str) -> str | None:
    """A program for a question of a known form.

    Args:
        question: in English; articles, plurals, capitals and "in the image" do not matter.

    Returns:
        Text of a program of language.py; None if the question has no known form.
    """
    if len(question) > _MAX_CHARACTERS:
        return None
    words = " ".join(question.lower().replace("northern", "north").replace("southern", "south").split())
    words = words.replace("eastern", "east").replace("western", "west").strip(" ?.!")
    words = re.sub(rf"^in {_IMAGE},? ", "", words)
    # The part of an image is asked about, the image as a whole is not.
    words = re.sub(
        rf"(?<!part)(?<!half)(?<!side)(?<!corner),? (?:visible |shown )?(?:in|on) {_IMAGE}$", "", words
    )
    for form, write in _FORMS:
        if found := form.fullmatch(words):
            program = write(**{key: value for key, value in found.groupdict().items() if value is not None})
            if program is not None:
                return program
    return None


def _objects(phrase: str) -> str | None:
    """The expression for a noun phrase with its attributes and relations; None if it is none."""
    phrase = phrase.strip(" ,")
    # `north` in "the north of the lake" belongs to a relation, in "the north of the image" to the image.
    if part := _PART.search(phrase):
        name = part["part"].replace(" ", "-")
        name = _PART_NAMES.get(name, "-".join(_PART_NAMES.get(word, word) for word in name.split("-")))
        head = _objects(phrase[: part.start()])
        return None if head is None else f'in_part({head}, "{name}")'
    if relation := _RELATION.search(phrase):
        head, rest = phrase[: relation.start()], phrase[relation.end() :]
        made = _objects(head)
        # Of several relations each holds of the head: "near the river and north of the lake".
        several = re.split(rf" and (?={_ANY_RELATION})", rest, maxsplit=1)
        other = _objects(several[0])
        if made is None or other is None:
            return None
        made = _related(relation, made, other)
        if len(several) == 1:
            return made
        following = _RELATION.match(several[-1])
        second = _objects(several[-1][following.end() :]) if following else None
        return None if following is None or second is None else _related(following, made, second)
    for separator in (" and ", " or "):
        first, found, second = phrase.partition(separator)
        if found:
            one, other = _objects(first), _objects(second)
            return None if one is None or other is None else f"union({one}, {other})"
    return _named(phrase)


def _related(relation: re.Match[str], objects: str, others: str) -> str:
    if relation["close"]:
        return f"near({objects}, {others}, {float(relation['metres']):g})"
    name = next(name for name in _RELATIONS if relation[name])
    return f"{name}({objects}, {others})"


def _named(phrase: str) -> str | None:
    """A noun with adjectives of size and shape before it."""
    words = re.sub(r"^(?:(?:a|an|the|any|some|at least one|one) )+", "", phrase)
    adjectives: list[str] = []
    while adjective := next(
        (of for of in sorted(_ATTRIBUTES, key=len)[::-1] if words.startswith(f"{of} ")), None
    ):
        adjectives.append(_ATTRIBUTES[adjective])
        words = words[len(adjective) + 1 :]
    if not _NOUN.fullmatch(words) or _NO_NOUN & set(words.split()):
        return None
    made = f'find("{singular(words)}")'
    for adjective in reversed(adjectives):
        made = f"{adjective}({made})"
    return made


def _one(form: str) -> Callable[..., str | None]:
    """Writes a program about one phrase: `form` has {a} for its objects."""

    def write(a: str) -> str | None:
        objects = _objects(a)
        return None if objects is None else form.format(a=objects)

    return write


def _two(form: str) -> Callable[..., str | None]:
    """Writes a program about two phrases, {a} and {b}."""

    def write(a: str, b: str) -> str | None:
        one, other = _objects(a), _objects(b)
        return None if one is None or other is None else form.format(a=one, b=other)

    return write


def _present(a: str) -> str | None:
    first, found, second = a.partition(" and ")
    if found and not _RELATION.match(second) and not _RELATION.search(a):
        one, other = _objects(first), _objects(second)
        return None if one is None or other is None else f"both(exists({one}), exists({other}))"
    return _one("exists({a})")(a)


def _counted(how: str, number: str, a: str) -> str | None:
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "ten": 10}
    value = numbers[number] if number in numbers else int(number)
    if value > 1_000_000:
        return None
    form = {
        "more than": "more(count({a}), %d)", "over": "more(count({a}), %d)",
        "less than": "less(count({a}), %d)", "fewer than": "less(count({a}), %d)",
        "at least": "negate(less(count({a}), %d))", "at most": "negate(more(count({a}), %d))",
        "exactly": "equal(count({a}), %d)",
    }[how] % value  # fmt: skip
    return _one(form)(a)


def _compared(quantity: str, how: str, a: str, b: str) -> str | None:
    if how in ("equal to", "the same as", "as large as"):
        operation = "equal"
    else:
        operation = "less" if how.split()[0] in ("less", "smaller", "lower", "fewer") else "more"
    return _two(f"{operation}({quantity}({{a}}), {quantity}({{b}}))")(a, b)


def _larger(how: str, a: str, b: str) -> str | None:
    one, other = _noun_of(a), _noun_of(b)
    operation = "less" if how in ("smaller", "less") else "more"
    if one is None or other is None:
        return None
    return _two(f'choose({operation}(area({{a}}), area({{b}})), "{one}", "{other}")')(a, b)


def _more_of(a: str, b: str) -> str | None:
    one, other = _noun_of(a), _noun_of(b)
    if one is None or other is None:
        return None
    return _two(f'choose(more(count({{a}}), count({{b}})), "{one}", "{other}")')(a, b)


def _classified(a: str, b: str) -> str | None:
    one, other = _noun_of(a), _noun_of(b)
    return None if one is None or other is None else f'classify("{one}", "{other}")'


def _noun_of(phrase: str) -> str | None:
    """A phrase as an answer names it: without its article."""
    words = re.sub(r"^(?:a|an|the) ", "", phrase.strip(" ,"))
    return (
        words if re.fullmatch(r"[a-z][a-z' -]{0,59}", words) and not _NO_NOUN & set(words.split()) else None
    )


_RURAL_OR_URBAN = (
    'built = union(find("residential area"), find("industrial area"))\n'
    f'choose(more(share(built), {_URBAN_SHARE:g}), "urban", "rural")'
)
_WHAT_IS = r"(?:what is|what's|what are|give me|tell me)"
_NUMBER = r"(?P<number>\d{1,9}|one|two|three|four|five|ten)"
_SEEN = r"(?: (?:are there|is there|there are|are present|are visible|can you see|can be seen|do you see|are shown))?"
_SHOWS = rf"(?:does {_IMAGE} (?:contain|show|have|include)|do you see|can you see|can i see)"
_MORE = r"more than|over|less than|fewer than|at least|at most|exactly"
_THAN = r"(?:larger|bigger|greater|higher|more|smaller|lower|less|fewer) than|equal to|the same as"


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


#: Forms of questions, and what writes their programs from their named parts; the first that fits and can be written.
_FORMS: tuple[tuple[re.Pattern[str], Callable[..., str | None]], ...] = (
    (_form(r"is (?:it|this|the area|this area) (?:a )?(?:rural|urban)(?: area)? or (?:an? )?(?:urban|rural)(?: area)?"),
     lambda: _RURAL_OR_URBAN),
    (_form(r"is (?:it|this|the image|the area) (?P<a>an? .+?) or (?P<b>an? .+)"), _classified),
    # Comparisons, before presence: they begin alike.
    (_form(r"are there more (?P<a>.+?) than (?P<b>.+)"), _two("more(count({a}), count({b}))")),
    (_form(r"are there (?:less|fewer) (?P<a>.+?) than (?P<b>.+)"), _two("less(count({a}), count({b}))")),
    (_form(r"are there as many (?P<a>.+?) as (?P<b>.+)"), _two("equal(count({a}), count({b}))")),
    (_form(r"is there more (?P<a>.+?) than (?P<b>.+)"), _two("more(area({a}), area({b}))")),
    (_form(r"is there less (?P<a>.+?) than (?P<b>.+)"), _two("less(area({a}), area({b}))")),
    (_form(rf"is the (?:number|amount) of (?P<a>.+?) (?P<how>{_THAN}) (?:the|that) ?(?:number|amount)? ?of (?P<b>.+)"),
     lambda **parts: _compared("count", **parts)),
    (_form(rf"is the area (?:of|covered by) (?P<a>.+?) (?P<how>{_THAN}) (?:the|that) ?(?:area)? ?(?:of|covered by) "
           r"(?P<b>.+)"), lambda **parts: _compared("area", **parts)),
    (_form(r"(?:is|are) (?P<a>.+?) (?P<how>(?:larger|bigger|smaller) than|as large as) (?P<b>.+)"),
     lambda **parts: _compared("area", **parts)),
    (_form(r"(?:which|what) (?:one )?(?:is|are) (?P<how>larger|bigger|smaller)[,:]? (?P<a>.+?),? or (?P<b>.+)"),
     _larger),
    (_form(r"(?:which|what) covers (?P<how>more|less)(?: area| of the image)?[,:]? (?P<a>.+?),? or (?P<b>.+)"),
     _larger),
    (_form(r"are there more (?P<a>.+?) or (?P<b>.+)"), _more_of),
    (_form(rf"(?:is|are) there (?P<how>{_MORE}) {_NUMBER} (?P<a>.+)"), _counted),
    (_form(r"is (?:most|more than half) of the (?:image|area) (?:covered by |covered with )?(?P<a>.+)"),
     _one("more(share({a}), 0.5)")),
    # Presence.
    (_form(r"(?:is|are) there (?P<a>.+)"), _present),
    (_form(r"(?:is|are) (?P<a>.+?) (?:present|visible|shown)"), _present),
    (_form(rf"{_SHOWS} (?P<a>.+)"), _present),
    # Counts.
    (_form(rf"(?:how many|count|count the|what number of) (?P<a>.+?){_SEEN}"), _one("count({a})")),
    (_form(rf"(?:{_WHAT_IS} )?the (?:number|amount|count) of (?P<a>.+)"), _one("count({a})")),
    # Areas and shares.
    (_form(rf"(?:{_WHAT_IS} )?the (?:total )?(?:area|extent|size) (?:that is )?(?:covered by|occupied by|of) "
           r"(?P<a>.+)"), _one("area({a})")),
    (_form(r"how (?:large|big) (?:is|are) (?P<a>.+)"), _one("area({a})")),
    (_form(r"how much (?:area|land|ground) (?:is|are) (?:covered by|occupied by) (?P<a>.+)"), _one("area({a})")),
    (_form(rf"(?:what|which) (?:share|fraction|percentage|proportion|part) of {_IMAGE} is "
           r"(?:covered by |covered with )?(?P<a>.+)"), _one("share({a})")),
    (_form(rf"how much of {_IMAGE} is (?:covered by |covered with )?(?P<a>.+)"), _one("share({a})")),
    # Places.
    (_form(r"where (?:is|are|can i find|do you see) (?P<a>.+)"), _one("where({a})")),
    (_form(r"(?:show|find|mark|locate)(?: me)?(?: all)? (?P<a>.+)"), _one("where({a})")),
    (_form(r"in which part of the (?:image|area) (?:is|are) (?P<a>.+)"), _one("where({a})")),
    (_form(r"how far (?:is|are) (?P<a>.+?) (?:away )?from (?P<b>.+)"), _two("distance({a}, {b})")),
    (_form(rf"(?:{_WHAT_IS} )?the distance between (?P<a>.+?) and (?P<b>.+)"), _two("distance({a}, {b})")),
    (_form(rf"(?:{_WHAT_IS} )?the distance from (?P<a>.+?) to (?P<b>.+)"), _two("distance({a}, {b})")),
    # "Is the lake north of the forest?"
    (_form(rf"(?:is|are) (?P<a>.+ {_ANY_RELATION}.+)"), _one("exists({a})")),
)  # fmt: skip
