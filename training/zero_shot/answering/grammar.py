"""Programs for questions of known forms: RSVQA's templates, and the plain ways to ask for what the language can answer.

Needs no model and no network. What the operations mean is in language.py; a language model that writes programs for any
question is in writers.py.
"""

import re
from collections.abc import Callable

from training.zero_shot.answering.language import ProgramError, parse
from training.zero_shot.answering.phrases import (
    AREA_UNITS,
    IMAGE,
    NUMBERS,
    VALUE,
    NotUnderstoodError,
    Reader,
    digits,
    quantity,
    refused,
    united,
)

#: A longer question is of no known form.
_MAX_CHARACTERS = 300
#: Rural is what is built over on less than this share.
_URBAN_SHARE = 0.15


def write_program(question: str) -> str:
    """A program for a question of a known form.

    A phrase belongs to the thing that it stands behind; behind `and` or `are`, to the first one. What could be read in
    two ways is refused, not guessed.

    Args:
        question: in English; articles, plurals, capitals and "in the image" do not matter.

    Returns:
        Text of a program of language.py.

    Raises:
        NotUnderstoodError: if the question has no known form; says which word is in the way.
    """
    if len(question) > _MAX_CHARACTERS:
        raise NotUnderstoodError(
            f"it has more than {_MAX_CHARACTERS} characters: ask for one thing at a time."
        )
    words = _plain(question)
    first: NotUnderstoodError | None = None
    for form, write in _FORMS:
        if found := form.fullmatch(words):
            try:
                program = write(
                    **{key: value for key, value in found.groupdict().items() if value is not None}
                )
                return parse(program).text
            except NotUnderstoodError as error:
                first = first or error
            except ProgramError as error:
                first = first or NotUnderstoodError(
                    f"its program is none ({error}): ask for one thing at a time."
                )
    raise first or NotUnderstoodError(
        "it has no form that the grammar knows: ask as in 'How many lakes are there?'."
    )


def _plain(question: str) -> str:
    """A question in lower case, with one spelling of directions, and without what says nothing."""
    words = " ".join(question.lower().replace("\u00b2", "2").replace("\u2019", "'").split()).strip(" ?.!")
    words = re.sub(r"\b(north|south)[- ]?(east|west)(?:ern)?\b", r"\1-\2", words)
    words = re.sub(r"\b(north|south|east|west)ern\b", r"\1", words)
    words = re.sub(r"(?<=\d),(?=\d{3}\b)", "", words).replace(",", " , ")
    words = re.sub(r",? (?:please|by any chance)$|^please,? ", "", " ".join(words.split()))
    words = re.sub(rf"^in {IMAGE} (?:, )?", "", words)
    return words.strip(" ,")


def _objects(phrase: str) -> str:
    return Reader(phrase).things().program()


def _one(form: str) -> Callable[..., str]:
    """Writes a program about one phrase: `form` has {a} for its objects."""
    return lambda a: form.format(a=_objects(a))


def _pair(a: str, b: str) -> tuple[str, str]:
    """Objects of two phrases; the second may leave out the thing: `houses in the north than in the south`."""
    things, reader = Reader(a).things(), Reader(b)
    if not reader.starts_with_modifier:
        return things.program(), reader.things().program()
    if len(things.each) > 1:
        raise refused("and", "name both things in full")
    return things.program(), reader.like(things.each[0]).program()


def _two(form: str) -> Callable[..., str]:
    """Writes a program about two phrases, {a} and {b}."""

    def write(a: str, b: str) -> str:
        one, other = _pair(a, b)
        return form.format(a=one, b=other)

    return write


def _distance(a: str, b: str) -> str:
    one, other = Reader(a).things(), Reader(b).things()
    if "and" in (one.joint, other.joint):
        raise refused("and", "ask for the distance of one of them at a time")
    return f"distance({one.program()}, {other.program()})"


def _present(a: str) -> str:
    if found := _AMOUNT.match(a):
        return _counted(found, a[found.end() :])
    if found := re.match(r"(?:no|not an?|not any) ", a):
        things = Reader(a[found.end() :]).things()
        if things.joint == "and":
            raise refused("and", "ask for one of them at a time")
        return f"negate(exists({things.program()}))"
    things = Reader(a).things()
    if things.joint != "and":
        return f"exists({things.program()})"
    return _both([f"exists({of.program()})" for of in things.each])


def _both(truths: list[str]) -> str:
    made = truths[0]
    for other in truths[1:]:
        made = f"both({made}, {other})"
    return made


def _predicate(a: str) -> str:
    """Whether what is said of a thing holds: "is the largest lake north of the forest"."""
    things = Reader(a).things(is_subject=True)
    if not all(of.modifiers for of in things.each):
        raise refused(things.each[-1].noun, "ask as in 'Is there a lake?' or 'Is the lake near a road?'")
    programs = [of.program(is_subject=True) for of in things.each]
    if things.joint == "and":
        return _both([f"exists({of})" for of in programs])
    return f"exists({united(programs)})"


def _counted(amount: re.Match[str], phrase: str) -> str:
    """Whether there are so many."""
    how, ending = amount["how"] or "", amount["ending"] or ""
    number = "1" if amount["multiple"] else amount["number"]
    value = digits(float(NUMBERS.get(number, number)), number)
    if how and how not in ("exactly", "only", "just") and ending:
        raise refused(ending)
    things = Reader(phrase).things()
    if things.joint == "and":
        raise refused("and", "ask for the number of one of them at a time")
    form = "equal({a}, {n})"
    if amount["multiple"] or how in ("more than", "over"):
        form = "more({a}, {n})"
    elif how in ("less than", "fewer than", "under"):
        form = "less({a}, {n})"
    elif how in ("at least", "no less than", "no fewer than") or ending == "or more":
        form = "negate(less({a}, {n}))"
    elif how in ("at most", "no more than", "not more than", "up to") or ending:
        form = "negate(more({a}, {n}))"
    return form.format(a=f"count({things.program()})", n=value)


def _compared(measure: str, how: str, a: str, b: str) -> str:
    if how in ("equal to", "the same as", "as large as"):
        operation = "equal"
    else:
        operation = "less" if how.split()[0] in ("less", "smaller", "lower", "fewer") else "more"
    if measure == "area" and (found := re.fullmatch(rf"{VALUE} ?(?P<unit>{_M2})", b)):
        return f"{operation}(area({_objects(a)}), {quantity(found, AREA_UNITS)})"
    if measure == "count" and (b.isdigit() or b in NUMBERS):
        return f"{operation}(count({_objects(a)}), {digits(float(NUMBERS.get(b, b)), b)})"
    return _two(f"{operation}({measure}({{a}}), {measure}({{b}}))")(a, b)


def _larger(how: str, a: str, b: str) -> str:
    operation = "less" if how in ("smaller", "less") else "more"
    one, other = _rival(a), _rival(b)
    return f'choose({operation}(area({one}), area({other})), "{_named(a)}", "{_named(b)}")'


def _more_of(a: str, b: str) -> str:
    return f'choose(more(count({_rival(a)}), count({_rival(b)})), "{_named(a)}", "{_named(b)}")'


def _rival(phrase: str) -> str:
    """One of two that the answer is one of."""
    things = Reader(phrase).things()
    if things.joint == "or":
        raise refused("or", "name two things")
    return things.program()


def _classified(a: str, b: str) -> str:
    for phrase in (a, b):
        things = Reader(phrase).things()
        if len(things.each) > 1 or things.each[0].modifiers:
            raise refused(phrase, "name two kinds of places, such as 'a forest or a desert'")
    return f'classify("{_named(a)}", "{_named(b)}")'


def _named(phrase: str) -> str:
    """A phrase as an answer names it: without its article."""
    return re.sub(r"^(?:an?|the) ", "", phrase.strip(" ,")).replace(" ,", ",")


def _measured(a: str, unit: str = "m2") -> str:
    if re.fullmatch(r"percent|per cent|%", unit):
        return f"share({_objects(a)})"
    if not re.fullmatch(next(iter(AREA_UNITS)), unit):
        raise refused(unit, "areas are answered in square metres; leave it out")
    return f"area({_objects(a)})"


_BUILT = 'built = union(find("residential area"), find("industrial area"))\n{}'
_IS_URBAN = f"more(share(built), {_URBAN_SHARE:g})"


def _is_urban(what: str) -> str:
    return _BUILT.format(_IS_URBAN if what == "urban" else f"negate({_IS_URBAN})")


_M2 = "|".join(AREA_UNITS)
_WHAT_IS = r"(?:what is|what's|what are|give me|tell me)"
_NUMBER = rf"(?P<number>\d{{1,9}}|{'|'.join(NUMBERS)})"
_AMOUNT = re.compile(
    r"(?:(?P<how>more than|over|less than|fewer than|under|at least|at most|exactly|only|just|no more than|"
    r"not more than|no less than|no fewer than|up to) )?"
    rf"(?:{_NUMBER}|(?P<multiple>multiple))(?: (?P<ending>or more|or fewer|or less))? "
)
_SEEN = (
    r"(?: (?:are there|is there|there are|are present|are visible|can you see|can be seen|do you see|are shown|exist|is"
    rf"|are)(?: (?:in|on) {IMAGE})?)?"
)
_SHOWS = rf"(?:does {IMAGE} (?:contain|show|have|include)|do you see|can you see|can i see)"
_THAN = r"(?:larger|bigger|greater|higher|more|smaller|lower|less|fewer) than|equal to|the same as"
_THIS = rf"(?:it|this|the area|this area|{IMAGE})"
_AREA = r"(?:area|scene|place|region|image)"
_COVERED = r"(?:covered (?:by|with|in) |occupied by )?"


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


#: Forms of questions, and what writes their programs from their named parts; the first that fits and can be written.
_FORMS: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = (
    (_form(rf"is {_THIS} (?:an? )?(?:rural|urban)(?: {_AREA})? or (?:an? )?(?:urban|rural)(?: {_AREA})?"),
     lambda: _BUILT.format(f'choose({_IS_URBAN}, "urban", "rural")')),
    (_form(rf"is {_THIS} (?:an? )?(?P<what>rural|urban)(?: {_AREA})?"), _is_urban),
    (_form(rf"is {_THIS} (?P<a>an? .+?) or (?P<b>an? .+)"), _classified),
    (_form(rf"is {_THIS} (?:mostly|mainly|predominantly|largely) {_COVERED}(?P<a>.+)"), _one("more(share({a}), 0.5)")),
    (_form(rf"is (?:most|more than half) of (?:{IMAGE}|the area) {_COVERED}(?P<a>.+)"),
     _one("more(share({a}), 0.5)")),
    # Comparisons, before presence: they begin alike.
    (_form(r"are there more (?P<a>.+?) than (?P<b>.+)"), _two("more(count({a}), count({b}))")),
    (_form(r"are there (?:less|fewer) (?P<a>.+?) than (?P<b>.+)"), _two("less(count({a}), count({b}))")),
    (_form(r"are there as many (?P<a>.+?) as (?P<b>.+)"), _two("equal(count({a}), count({b}))")),
    (_form(r"is there more (?P<a>.+?) than (?P<b>.+)"), _two("more(area({a}), area({b}))")),
    (_form(r"is there less (?P<a>.+?) than (?P<b>.+)"), _two("less(area({a}), area({b}))")),
    (_form(rf"is the (?:number|amount) of (?P<a>.+?) (?P<how>{_THAN}) (?:(?:the|that) ?(?:number|amount)? ?of )?"
           r"(?P<b>.+)"), lambda **parts: _compared("count", **parts)),
    (_form(rf"is the area (?:of|covered by) (?P<a>.+?) (?P<how>{_THAN}) "
           r"(?:(?:the|that) ?(?:area)? ?(?:of|covered by) )?(?P<b>.+)"), lambda **parts: _compared("area", **parts)),
    (_form(r"(?:is|are) (?!there )(?P<a>.+?) (?P<how>(?:larger|bigger|smaller) than|as large as) (?P<b>.+)"),
     lambda **parts: _compared("area", **parts)),
    (_form(r"(?:which|what) (?:one )?(?:is|are) (?P<how>larger|bigger|smaller)(?: [,:]|:)? (?P<a>.+?)(?: ,)? or "
           r"(?P<b>.+)"), _larger),
    (_form(r"(?:which|what) covers (?P<how>more|less)(?: area| of the image)?(?: [,:]|:)? (?P<a>.+?)(?: ,)? or "
           r"(?P<b>.+)"), _larger),
    (_form(r"are there more (?P<a>.+?) or (?P<b>.+)"), _more_of),
    # Presence.
    (_form(r"(?:is|are) there (?P<a>.+)"), _present),
    (_form(r"(?:is|are) (?P<a>.+?) (?:present|visible|shown)(?: (?:in|on) the image)?"), _present),
    (_form(rf"{_SHOWS} (?P<a>.+)"), _present),
    # Areas and shares.
    (_form(rf"how many (?P<unit>{_M2}) of (?P<a>.+?){_SEEN}"), _measured),
    (_form(rf"(?:{_WHAT_IS} )?the (?:total )?(?:area|extent|size) (?:that is )?(?:covered by|occupied by|of) "
           rf"(?P<a>.+?)(?: in (?P<unit>{_M2}|percent|per cent|%))?"), _measured),
    (_form(rf"how (?:large|big) (?:is|are) (?P<a>.+?)(?: in (?P<unit>{_M2}|percent|per cent|%))?"),
     _measured),
    (_form(rf"how much (?:area|land|ground) (?:is|are) {_COVERED}(?P<a>.+)"), _one("area({a})")),
    (_form(rf"(?:what|which) (?:share|fraction|percentage|proportion|part) of {IMAGE} is {_COVERED}(?P<a>.+)"),
     _one("share({a})")),
    (_form(rf"how much of {IMAGE} is {_COVERED}(?P<a>.+)"), _one("share({a})")),
    (_form(rf"how much (?P<a>.+?){_SEEN}"), _one("area({a})")),
    # Counts.
    (_form(rf"(?:how many|count(?: all)?(?: the)?|what number of) (?P<a>.+?){_SEEN}"), _one("count({a})")),
    (_form(rf"(?:{_WHAT_IS} )?the (?:number|amount|count) of (?P<a>.+)"), _one("count({a})")),
    # Places.
    (_form(r"where (?:is|are|can i find|do you see) (?P<a>.+?)(?: located| situated| found)?"), _one("where({a})")),
    (_form(r"(?:show|find|mark|locate)(?: me)?(?: all)? (?P<a>.+)"), _one("where({a})")),
    (_form(rf"in which part of (?:{IMAGE}|the area) (?:is|are) (?P<a>.+)"), _one("where({a})")),
    (_form(r"how far (?:is|are) (?P<a>.+?) (?:away )?from (?P<b>.+)"), _distance),
    (_form(rf"(?:{_WHAT_IS} )?the distance between (?P<a>.+?) and (?P<b>.+)"), _distance),
    (_form(rf"(?:{_WHAT_IS} )?the distance from (?P<a>.+?) to (?P<b>.+)"), _distance),
    # "Is the lake north of the forest?"
    (_form(r"(?:is|are) (?P<a>.+)"), _predicate),
)  # fmt: skip
