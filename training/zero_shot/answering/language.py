"""The language of programs that answer questions about an image: its operations, its parser and its type check.

Programs are text from a model or a grammar and are never trusted: nothing here evaluates anything. What operations do
is in interpreter.py, who writes programs in grammar.py and writers.py.

A program is a few lines of `name = expression`, and one last expression, which is the answer. An expression is a call
of an operation, a text in quotes, a number, or a name. There are no loops, functions, attributes or operators.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from graft_pipeline.errors import InputError

#: Kinds of values. Quantities are compared with their own kind alone: a count is no area.
Kind = Literal["objects", "truth", "text", "count", "area", "share", "distance", "number"]
#: Kinds that are numbers, with their units; `number` is one that is written in the program, and fits any of them.
QUANTITIES: dict[Kind, str] = {"count": "", "area": "m2", "share": "0 to 1", "distance": "m", "number": ""}

#: Bounds of a program; what a run may use is in interpreter.Limits.
MAX_CHARACTERS = 4000
MAX_CALLS = 100
MAX_DEPTH = 24
MAX_TEXT = 80
MAX_NUMBER = 1e9

#: Metres between things that are `near` each other, unless a program says otherwise.
NEAR_M = 50.0
#: Areas from which objects are medium and large, m2: those of RSVQA's questions (Lobry et al., 2020).
MEDIUM_M2, LARGE_M2 = 100.0, 500.0

PARTS = ("north", "east", "south", "west", "center")


class ProgramError(InputError):
    """A program is not one of this language, or asks for more than a run may use.

    Attributes:
        line: where, from 1.
        column: where, from 1.
    """

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"Line {line}, column {column}: {message}")
        self.line, self.column = line, column


@dataclass(frozen=True)
class Parameter:
    """One argument of an operation.

    Attributes:
        name: as programs may spell it, `metres=50`.
        kind: of its values; "number" takes any quantity, and all such arguments of a call must be of one kind.
        default: value when it is left out; None: it must be given.
        is_literal: whether it must be written in the program, not computed by it.
    """

    name: str
    kind: Kind
    default: float | None = None
    is_literal: bool = False


@dataclass(frozen=True)
class Operation:
    """What a program may call.

    Attributes:
        name: as programs call it.
        parameters: its arguments in order.
        result: kind of its value; "number": that of its arguments.
        help: what it does, one sentence for people and models.
        is_repeated: whether the last parameter may be given many times.
    """

    name: str
    parameters: tuple[Parameter, ...]
    result: Kind
    help: str
    is_repeated: bool = False

    @property
    def signature(self) -> str:
        """The operation as it is called, such as `count(objects) -> count`."""
        given = [of.name if of.default is None else f"{of.name}={of.default:g}" for of in self.parameters]
        return f"{self.name}({', '.join(given)}{', ...' if self.is_repeated else ''}) -> {self.result}"


_OBJECTS, _OTHERS = Parameter("objects", "objects"), Parameter("others", "objects")
_FIRST, _SECOND = Parameter("first", "number"), Parameter("second", "number")

#: Every operation: the one place where its name, its types and its meaning are written.
OPERATIONS: dict[str, Operation] = {
    of.name: of
    for of in (
        Operation(
            "find",
            (Parameter("concept", "text", is_literal=True),),
            "objects",
            'Every object of a concept in the image. The concept is a short English noun phrase in the singular, such '
            'as "baseball field", without adjectives of size, shape or place.',
        ),
        Operation("exists", (_OBJECTS,), "truth", "Whether there is at least one."),
        Operation("count", (_OBJECTS,), "count", "How many there are."),
        Operation("area", (_OBJECTS,), "area", "Square metres that they cover together."),
        Operation("share", (_OBJECTS,), "share", "Share of the image that they cover together, 0 to 1."),
        Operation(
            "distance", (_OBJECTS, _OTHERS), "distance",
            "Metres between the nearest edges of any two; unknown if either has none.",
        ),
        Operation("where", (_OBJECTS,), "text", 'The part of the image where most of them is, such as "north-west".'),
        Operation(
            "classify", (Parameter("options", "text"),), "text",
            "The option that the whole image looks most like.", True,
        ),
        Operation(
            "choose", (Parameter("condition", "truth"), Parameter("yes", "text"), Parameter("no", "text")), "text",
            "The first text if the condition holds, else the second; unknown if it compares what is the same.",
        ),
        Operation("more", (_FIRST, _SECOND), "truth", "Whether the first is larger than the second."),
        Operation("less", (_FIRST, _SECOND), "truth", "Whether the first is smaller than the second."),
        Operation("equal", (_FIRST, _SECOND), "truth", "Whether they are the same."),
        Operation("add", (_FIRST, _SECOND), "number", "Their sum."),
        Operation("subtract", (_FIRST, _SECOND), "number", "The first without the second, at least 0."),
        Operation("both", (Parameter("one", "truth"), Parameter("other", "truth")), "truth", "Whether both hold."),
        Operation("either", (Parameter("one", "truth"), Parameter("other", "truth")), "truth", "Whether one holds."),
        Operation("negate", (Parameter("condition", "truth"),), "truth", "Whether it does not hold."),
        Operation(
            "north_of", (_OBJECTS, _OTHERS), "objects",
            "Those that lie wholly north of (above, at the top of) the middle of one of the others.",
        ),
        Operation("south_of", (_OBJECTS, _OTHERS), "objects", "The same for south of (below, at the bottom of)."),
        Operation("east_of", (_OBJECTS, _OTHERS), "objects", "The same for east of (on the right of)."),
        Operation("west_of", (_OBJECTS, _OTHERS), "objects", "The same for west of (on the left of)."),
        Operation(
            "near", (_OBJECTS, _OTHERS, Parameter("metres", "number", NEAR_M)), "objects",
            "Those whose edge is at most so many metres from one of the others (next to, close to, along).",
        ),
        Operation(
            "inside", (_OBJECTS, _OTHERS), "objects",
            "Those that lie for the most part within one of the others, or are surrounded by it.",
        ),
        Operation(
            "nearest", (_OBJECTS, _OTHERS), "objects",
            "The one that is nearest to any of the others; none if there is none.",
        ),
        Operation(
            "in_part", (_OBJECTS, Parameter("part", "text", is_literal=True)), "objects",
            f"Those whose middle is in a part of the image: {', '.join(PARTS)}, or two joined, such as \"north-west\".",
        ),
        Operation("largest", (_OBJECTS,), "objects", "The one of the largest area; none if there is none."),
        Operation("smallest", (_OBJECTS,), "objects", "The one of the smallest area; none if there is none."),
        Operation("small", (_OBJECTS,), "objects", f"Those of less than {MEDIUM_M2:g} m2."),
        Operation("medium", (_OBJECTS,), "objects", f"Those of {MEDIUM_M2:g} m2 to less than {LARGE_M2:g} m2."),
        Operation("large", (_OBJECTS,), "objects", f"Those of {LARGE_M2:g} m2 and more."),
        Operation(
            "sized", (_OBJECTS, Parameter("least_m2", "number"), Parameter("most_m2", "number", MAX_NUMBER)), "objects",
            "Those of an area between two numbers of square metres.",
        ),
        Operation("square", (_OBJECTS,), "objects", "Those of a square shape."),
        Operation("rectangular", (_OBJECTS,), "objects", "Those of a rectangular shape; squares are too."),
        Operation("circular", (_OBJECTS,), "objects", "Those of a round shape."),
        Operation("union", (_OBJECTS, _OTHERS), "objects", "Those of either, each once."),
        Operation("intersection", (_OBJECTS, _OTHERS), "objects", "Those that are in both."),
        Operation("without", (_OBJECTS, _OTHERS), "objects", "Those of the first that are not in the second."),
    )
}  # fmt: skip

#: What a model has to know to write programs.
API_TEXT = "\n".join(
    (
        "A program is at most a few lines `name = expression`, then one last expression: the answer.",
        "An expression is a call of an operation below, a text in double quotes, a number, or a name bound above it.",
        "There is nothing else: no imports, loops, functions, attributes, operators, lists or comments in prose.",
        "The last expression must not be objects: ask something about them. North is up.",
        "",
        "Operations:",
        *(f"- {of.signature}: {of.help}" for of in OPERATIONS.values()),
        "",
        "Examples:",
        "How many baseball fields are north of the river?",
        'count(north_of(find("baseball field"), find("river")))',
        "Are there more large buildings than ponds?",
        'buildings = large(find("building"))',
        'more(count(buildings), count(find("pond")))',
        "Which is larger, the forest or the lake?",
        'choose(more(area(find("forest")), area(find("lake"))), "forest", "lake")',
    )
)


@dataclass(frozen=True)
class Value:
    """A text or number as a program writes it; also its place in the text."""

    value: str | float
    kind: Kind
    line: int
    column: int
    depth: int = 1


@dataclass(frozen=True, eq=False)
class Call:
    """A call with its arguments in the order of the operation's parameters; also its place in the text.

    A name stands for the very call that it was bound to, so a call may be the argument of several.
    """

    operation: Operation
    arguments: "tuple[Call | Value, ...]"
    kind: Kind
    line: int
    column: int
    depth: int


@dataclass(frozen=True)
class Program:
    """A program whose types fit.

    Attributes:
        text: as it was written.
        answer: the call whose value is the answer.
        concepts: what it looks for in the image, each once.
    """

    text: str
    answer: Call
    concepts: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """Kind of the answer."""
        return self.answer.kind


def parse(text: str) -> Program:
    """Read a program and check its types; nothing is run.

    Args:
        text: the program, at most `MAX_CHARACTERS`.

    Returns:
        The program.

    Raises:
        ProgramError: if it is no program of this language: where, and what to write instead.
    """
    if len(text) > MAX_CHARACTERS:
        raise ProgramError(f"a program has at most {MAX_CHARACTERS} characters: write a shorter one.", 1, 1)
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        for column, letter in enumerate(line, start=1):
            # In comments, too: programs are shown on terminals, which obey control characters.
            if not letter.isprintable() and letter != "\t":
                raise ProgramError(f"{letter!r} cannot be printed: leave it out.", number, column)
    return _Parser(text).program()


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int
    column: int


_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+|\#[^\n]*)
      | (?P<end>[\n;])
      | (?P<name>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<number>[0-9]+(\.[0-9]+)?)
      | (?P<text>"[^"\n]*"|'[^'\n]*')
      | (?P<mark>[(),=])""",
    re.VERBOSE,
)


def _tokens(text: str) -> Iterator[_Token]:
    line, start, at, open_marks = 1, 0, 0, 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        column = at - start + 1
        if found is None:
            is_quote = text[at] in "\"'"
            what = (
                "a text without its closing quote"
                if is_quote
                else f"{text[at]!r} is not part of the language"
            )
            raise ProgramError(
                f'{what}: write calls of operations only, such as count(find("lake")).', line, column
            )
        kind = str(found.lastgroup)
        open_marks += {"(": 1, ")": -1}.get(found[0], 0)
        # Within parentheses a new line is nothing but space.
        if kind != "blank" and not (kind == "end" and open_marks > 0):
            yield _Token(kind, found[0], line, column)
        at = found.end()
        if found[0] == "\n":
            line, start = line + 1, at
    yield _Token("end", "", line, len(text) - start + 1)


class _Parser:
    """Recursive descent, with bounds on depth and on the number of calls."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_tokens(text))
        self._at = 0
        self._calls: list[Call] = []
        self._names: dict[str, Call | Value] = {}

    def program(self) -> Program:
        answer: Call | Value | None = None
        token = self._next_beyond_ends()
        while token is not None:
            if answer is not None:
                raise _error("only the last line may lack a name: bind this one, name = ...", answer)
            following = self._tokens[self._at + 1]
            if token.kind == "name" and following.text == "=":
                self._bind(token)
            else:
                answer = self._expression(1)
            if self._peek().kind != "end":
                raise _error(
                    f"expected the end of the line, not {self._peek().text!r}: write one expression a line.",
                    self._peek(),
                )
            token = self._next_beyond_ends()
        if not isinstance(answer, Call):
            raise _error(
                'the last line must be a call that gives the answer, such as count(find("lake")).',
                answer or self._tokens[-1],
            )
        if answer.kind == "objects":
            raise _error(
                "the answer must not be objects: ask with count(...), exists(...), area(...) or where(...).",
                answer,
            )
        looking = [call for call in self._calls if call.operation.name in ("find", "classify")]
        if not looking:
            raise _error("the program does not look at the image: call find(...) or classify(...).", answer)
        concepts = (str(call.arguments[0].value) for call in looking if call.operation.name == "find")
        return Program(self._text, answer, tuple(dict.fromkeys(concepts)))

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _next(self) -> _Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _next_beyond_ends(self) -> _Token | None:
        while self._peek().kind == "end":
            if self._at == len(self._tokens) - 1:
                return None
            self._at += 1
        return self._peek()

    def _expect(self, mark: str, after: str) -> None:
        token = self._next()
        if token.text != mark:
            raise _error(f"expected {mark!r} after {after}, not {_shown(token)}: close the call.", token)

    def _bind(self, name: _Token) -> None:
        if name.text in OPERATIONS or name.text in self._names:
            raise _error(f"{name.text!r} is taken: bind another name.", name)
        self._at += 2
        self._names[name.text] = self._expression(1)

    def _expression(self, depth: int) -> "Call | Value":
        token = self._next()
        if depth > MAX_DEPTH:
            raise _error(f"calls are nested more than {MAX_DEPTH} deep: write a simpler program.", token)
        if token.kind == "text":
            return _text(token)
        if token.kind == "number":
            # The length first: converting very long digits takes long.
            if len(token.text) > 20 or float(token.text) > MAX_NUMBER:
                raise _error(f"numbers are at most {MAX_NUMBER:g}: write a smaller one.", token)
            return Value(float(token.text), "number", token.line, token.column)
        if token.kind == "name" and self._peek().text == "(":
            return self._call(token, depth)
        if token.kind == "name":
            if token.text in self._names:
                return self._names[token.text]
            raise _error(
                f"{token.text!r} is not bound: write {token.text} = ... above, or quote a text.", token
            )
        raise _error(
            f"expected a call, a text or a number, not {_shown(token)}: complete the expression.", token
        )

    def _call(self, name: _Token, depth: int) -> Call:
        operation = OPERATIONS.get(name.text)
        if operation is None:
            like = difflib.get_close_matches(name.text[:40], OPERATIONS, 3) or list(OPERATIONS)
            raise _error(f"there is no operation {name.text[:40]!r}: use {', '.join(like)}.", name)
        self._next()
        given: dict[str, Call | Value] = {}
        several: list[Call | Value] = []
        while self._peek().text != ")":
            if given or several:
                self._expect(",", "an argument")
            token = self._peek()
            if token.kind == "name" and self._tokens[min(self._at + 1, len(self._tokens) - 1)].text == "=":
                self._at += 2
                if token.text not in {of.name for of in operation.parameters} or operation.is_repeated:
                    raise _error(
                        f"{name.text} has no argument {token.text!r}: write {operation.signature}.", token
                    )
                key = token.text
            elif operation.is_repeated:
                several.append(self._expression(depth + 1))
                continue
            elif len(given) < len(operation.parameters):
                key = operation.parameters[len(given)].name
            else:
                raise _error(f"too many arguments: write {operation.signature}.", token)
            if key in given:
                raise _error(f"{key} is given twice: write {operation.signature}.", token)
            given[key] = self._expression(depth + 1)
        self._next()
        if operation.is_repeated and len(several) < 2:
            raise _error(f"{name.text} needs at least two {operation.parameters[-1].name}.", name)
        arguments: list[Call | Value] = list(several)
        for parameter in () if operation.is_repeated else operation.parameters:
            if parameter.name in given:
                arguments.append(given[parameter.name])
            elif parameter.default is not None:
                arguments.append(Value(parameter.default, "number", name.line, name.column))
            else:
                raise _error(f"{parameter.name} is missing: write {operation.signature}.", name)
        result = _checked(operation, arguments, name)
        deepest = 1 + max(argument.depth for argument in arguments)
        if deepest > MAX_DEPTH or len(self._calls) >= MAX_CALLS:
            raise _error(
                f"a program has at most {MAX_CALLS} calls, nested at most {MAX_DEPTH} deep: write a simpler one.",
                name,
            )
        call = Call(operation, tuple(arguments), result, name.line, name.column, deepest)
        self._calls.append(call)
        return call


def _checked(operation: Operation, arguments: "list[Call | Value]", name: _Token) -> Kind:
    """The kind of a call's value, once its arguments are of the kinds that it takes."""
    parameters = operation.parameters * len(arguments) if operation.is_repeated else operation.parameters
    quantities: set[Kind] = set()
    for parameter, argument in zip(parameters, arguments, strict=True):
        does_fit = (
            argument.kind in QUANTITIES if parameter.kind == "number" else argument.kind == parameter.kind
        )
        if not does_fit:
            raise _error(
                f"{parameter.name} of {operation.name} is {parameter.kind}, not {argument.kind}: write "
                f"{operation.signature}.",
                argument,
            )
        if parameter.is_literal and not isinstance(argument, Value):
            raise _error(f"write the {parameter.name} of {operation.name} itself, in quotes.", argument)
        if parameter.kind == "number" and argument.kind != "number":
            quantities.add(argument.kind)
    if len(quantities) > 1:
        raise _error(
            f"{operation.name} takes quantities of one kind, not {' and '.join(sorted(quantities))}: compare "
            "counts with counts, areas with areas.",
            name,
        )
    if operation.name == "in_part" and isinstance(arguments[1], Value):
        part = str(arguments[1].value)
        if not set(part.split("-")) <= set(PARTS):
            raise _error(
                f"{part!r} is no part of an image: use {', '.join(PARTS)}, or two joined by '-'.",
                arguments[1],
            )
    if operation.result != "number":
        return operation.result
    return quantities.pop() if quantities else "number"


def _text(token: _Token) -> Value:
    words = " ".join(token.text[1:-1].split())
    if (
        not words
        or len(words) > MAX_TEXT
        or not any(letter.isalpha() for letter in words)
        or not words.isprintable()
    ):
        raise _error(f"a text is a few words of at most {MAX_TEXT} characters: shorten it.", token)
    return Value(words, "text", token.line, token.column)


def _shown(token: _Token) -> str:
    return repr(token.text[:40]) if token.text.strip() else "the end"


def _error(message: str, at: "_Token | Call | Value") -> ProgramError:
    return ProgramError(message, at.line, at.column)
