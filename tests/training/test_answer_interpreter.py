"""What operations do, on rectangles whose places are known."""

import time
import tracemalloc

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from training.zero_shot.answering.interpreter import RUNS, Detected, Image, Interpreter, Limits, Unknown
from training.zero_shot.answering.language import OPERATIONS, QUANTITIES, ProgramError, parse

#: Machines that run tests are busy: no deadline.
quick = settings(max_examples=40, deadline=None)
SIDE = 40
CONCEPTS = ("house", "lake", "road")
boxes = st.tuples(
    st.integers(0, SIDE - 2), st.integers(0, SIDE - 2), st.integers(1, 14), st.integers(1, 14)
).map(lambda of: (of[0], of[1], min(SIDE, of[0] + of[2]), min(SIDE, of[1] + of[3])))
#: A detector finds nothing twice; two concepts may be on the same pixels.
worlds = st.fixed_dictionaries({concept: st.lists(boxes, max_size=5, unique=True) for concept in CONCEPTS})


class Knows:
    """A detector that was told: rectangles (top, left, bottom, right) by concept; each is found as one object."""

    def __init__(self, known):
        self.known = {
            concept: tuple(
                Detected(concept, top, left, np.ones((bottom - top, right - left), bool), 0.9)
                for top, left, bottom, right in some
            )
            for concept, some in known.items()
        }
        self.asked = []

    def find(self, image, concept, tick):
        self.asked.append(concept)
        return self.known.get(concept, ())

    def classify(self, image, options, tick):
        return np.array([len(option) for option in options], np.float32)


def blank(side=SIDE, gsd_m=2.0):
    return Image(np.zeros((side, side, 3), np.uint8), gsd_m)


def run(text, world, **limits):
    return Interpreter(Knows(world), Limits(**limits)).run(parse(text), blank())


def ask(text, world):
    return run(text, world).value


A, B = 'find("house")', 'find("lake")'
DIRECTIONS = ("north_of", "east_of", "south_of", "west_of")


def test_every_operation_of_the_language_runs_and_no_other():
    assert set(RUNS) == set(OPERATIONS)


@quick
@given(worlds)
def test_sets_of_objects_are_sets(world):
    union = ask(f"count(union({A}, {B}))", world)
    both = ask(f"count(intersection({A}, {B}))", world)
    a, b = ask(f"count({A})", world), ask(f"count({B})", world)
    assert max(a, b) <= union == a + b - both
    assert ask(f"count(without(union({A}, {B}), {B}))", world) == a - both
    assert ask(f"count(union({A}, {A}))", world) == a
    near = f"near({A}, {B}, 20)"
    assert ask(f"count(without({A}, {near}))", world) == a - ask(f"count({near})", world)
    assert ask(f"exists({A})", world) is (a > 0)


@quick
@given(worlds)
def test_areas_count_shared_ground_once(world):
    canvas = np.zeros((SIDE, SIDE), bool)
    for top, left, bottom, right in (*world["house"], *world["lake"]):
        canvas[top:bottom, left:right] = True
    assert ask(f"area(union({A}, {B}))", world) == canvas.sum() * 4
    assert ask(f"share(union({A}, {B}))", world) == canvas.mean()
    assert ask(f"area(largest({A}))", world) >= ask(f"area(smallest({A}))", world)


@quick
@given(worlds)
def test_sizes_divide_objects_among_them(world):
    counts = [ask(f"count({size}({A}))", world) for size in ("small", "medium", "large")]
    assert sum(counts) == len(world["house"])
    pixels = [(bottom - top) * (right - left) * 4 for top, left, bottom, right in world["house"]]
    assert counts == [
        sum(p < 100 for p in pixels),
        sum(100 <= p < 500 for p in pixels),
        sum(p >= 500 for p in pixels),
    ]
    assert ask(f"count(sized({A}, 100, 500))", world) == counts[1]


@quick
@given(st.sampled_from(["count", "area", "share"]), worlds)
def test_of_two_quantities_one_is_more_or_less_or_they_are_equal(quantity, world):
    pair = f"({quantity}({A}), {quantity}({B}))"
    more, less, equal = (ask(f"{name}{pair}", world) for name in ("more", "less", "equal"))
    assert more + less + equal == 1
    assert ask(f"both({'more' + pair}, {'less' + pair})", world) is False
    assert ask(f"either({'more' + pair}, negate({'more' + pair}))", world) is True
    assert ask(f"subtract{pair}", world) == max(
        0, ask(f"subtract({quantity}({A}), 0)", world) - ask(f"{quantity}({B})", world)
    )


@quick
@given(boxes, boxes, st.sampled_from(DIRECTIONS))
def test_directions_are_antisymmetric(one, other, direction):
    world = {"house": [one], "lake": [other]}
    opposite = DIRECTIONS[(DIRECTIONS.index(direction) + 2) % 4]
    if ask(f"exists({direction}({A}, {B}))", world):
        assert not ask(f"exists({direction}({B}, {A}))", world)
        assert not ask(f"exists({opposite}({A}, {B}))", world)


@quick
@given(worlds)
def test_directions_turn_with_the_image(world):
    flipped = {
        name: [(SIDE - bottom, left, SIDE - top, right) for top, left, bottom, right in of]
        for name, of in world.items()
    }
    turned = {
        name: [(left, top, right, bottom) for top, left, bottom, right in of] for name, of in world.items()
    }
    counts = {name: ask(f"count({name}({A}, {B}))", world) for name in DIRECTIONS}
    assert ask(f"count(north_of({A}, {B}))", flipped) == counts["south_of"]
    assert ask(f"count(east_of({A}, {B}))", flipped) == counts["east_of"]
    assert ask(f"count(west_of({A}, {B}))", turned) == counts["north_of"]
    assert ask(f"count(east_of({A}, {B}))", turned) == counts["south_of"]


@quick
@given(boxes, boxes)
def test_gaps_are_those_between_the_nearest_pixels(one, other):
    masks = []
    for top, left, bottom, right in (one, other):
        mask = np.zeros((SIDE, SIDE), bool)
        mask[top:bottom, left:right] = True
        masks.append(mask)
    places = [np.argwhere(mask) for mask in masks]
    nearest = np.sqrt(((places[0][:, None] - places[1][None]) ** 2).sum(axis=-1).min())
    gap = max(0.0, nearest - 1)
    a, b = (Detected.of_mask("thing", mask, 1.0) for mask in masks)
    assert a.gap_px(b) == pytest.approx(gap) == b.gap_px(a)
    if one == other:
        return
    world = {"house": [one], "lake": [other]}
    assert ask(f"distance({A}, {B})", world) == pytest.approx(2 * gap)
    assert ask(f"exists(near({A}, {B}, {2 * gap + 0.1:.3f}))", world)
    if gap > 0.1:
        assert not ask(f"exists(near({A}, {B}, {2 * gap - 0.1:.3f}))", world)


@quick
@given(worlds, st.integers(0, 40), st.integers(0, 40))
def test_more_is_near_within_more_metres(world, metres, further):
    counts = [ask(f"count(near({A}, {B}, {m}))", world) for m in (metres, metres + further, 1000)]
    assert counts == sorted(counts)
    near_another = [any(lake != house for lake in world["lake"]) for house in world["house"]]
    assert counts[-1] == sum(near_another)
    assert ask(f"count(nearest({A}, {B}))", world) == any(near_another)


def test_nothing_is_related_to_itself():
    world = {"house": [(0, 0, 4, 4)]}
    for relation in (*DIRECTIONS, "near", "inside", "nearest"):
        assert ask(f"count({relation}({A}, {A}))", world) == 0
    assert run(f"distance({A}, {A})", world).text == "unknown: there is only one of them"


def test_words_for_one_thing_do_not_make_two_of_it():
    """Lake and pond are one class of OpenStreetMap's: what is found as both is one body of water."""
    waters = [(0, 0, 8, 8), (20, 20, 30, 30)]
    world = {"lake": waters, "pond": waters, "house": [(0, 10, 4, 14)]}
    lake, pond = 'find("lake")', 'find("pond")'
    assert ask(f"count(union({lake}, {pond}))", world) == 2
    assert ask(f"count(intersection({lake}, {pond}))", world) == 2
    assert ask(f"count(without({lake}, {pond}))", world) == 0
    assert ask(f"exists(near({lake}, {pond}, 10))", world) is False
    assert ask(f"exists(inside({lake}, {pond}))", world) is False
    # The nearest pond to a lake is another one.
    assert ask(f"distance({lake}, {pond})", world) == pytest.approx(2 * (np.hypot(13, 13) - 1))
    assert ask(f"exists(near({A}, {pond}, 10))", world) is True
    detector = Knows(world)
    program = parse('count(union(find("Lake"), find("lakes")))')
    assert Interpreter(detector).run(program, blank()).value == 2
    assert detector.asked == ["lake"]


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (f"distance({A}, {B})", "unknown: there is no lake"),
        (f"distance({B}, large({A}))", "unknown: there is no lake"),
        (f'distance({A}, large(find("house")))', "unknown: there is no such house"),
        (f"more(distance({A}, {B}), 100)", "unknown: there is no lake"),
        (f"count(near({A}, {A}, distance({A}, {B})))", "unknown: there is no lake"),
        (f'choose(more(area({B}), area(find("road"))), "lake", "road")', "unknown: there is neither lake nor road"),
        (f'choose(less(area({B}), area({A})), "lake", "house")', "lake"),
        (f'choose(more(count({A}), count({A})), "a", "b")', "unknown: both are 1"),
        (f'choose(more(share({B}), 0), "some", "none")', "none"),
    ],
)  # fmt: skip
def test_of_what_is_not_there_no_answer_is_made_up(program, answer):
    made = run(program, {"house": [(0, 0, 4, 4)]})
    assert made.text == answer
    assert made.evidence.steps[-1].shown == answer


def test_a_slanting_river_is_met_where_one_stands():
    river = np.zeros((SIDE, SIDE), bool)
    for column in range(SIDE):
        river[max(0, column - 3) : column + 1, column] = True
    house = np.zeros((SIDE, SIDE), bool)
    # Below the river's middle, but above the river where it passes here.
    house[22:26, 34:38] = True
    a, b = Detected.of_mask("house", house, 1.0), Detected.of_mask("river", river, 1.0)
    detector = Knows({})
    detector.known = {"house": (a,), "river": (b,)}
    for relation, holds in (("north_of", True), ("south_of", False), ("east_of", True), ("west_of", False)):
        program = parse(f'exists({relation}(find("house"), find("river")))')
        assert Interpreter(detector).run(program, blank()).value is holds


def test_inside_is_within_or_in_a_hole():
    ring = np.ones((SIDE, SIDE), bool)
    ring[10:30, 10:30] = False
    detector = Knows({"house": [(15, 15, 20, 20), (0, 0, 5, 5)]})
    detector.known["lake"] = (Detected.of_mask("lake", ring, 1.0),)
    assert Interpreter(detector).run(parse(f"count(inside({A}, {B}))"), blank()).value == 2
    assert ask(f"count(inside({A}, {B}))", {"house": [(0, 0, 4, 4)], "lake": [(3, 3, 9, 9)]}) == 0


@pytest.mark.parametrize(
    ("box", "where", "parts"),
    [
        ((0, 0, 6, 6), "north-west", ("north", "west", "north-west")),
        ((34, 17, 40, 23), "south", ("south",)),
        ((17, 17, 23, 23), "center", ("center",)),
        ((16, 34, 22, 40), "east", ("east", "north-east")),
        ((0, 0, 40, 36), "everywhere", ("west",)),
    ],
)
def test_places_have_names(box, where, parts):
    world = {"house": [box]}
    assert ask(f"where({A})", world) == where
    for part in parts:
        assert ask(f'exists(in_part({A}, "{part}"))', world)
    assert ask(f"where({B})", world) == "nowhere"


def test_shapes_are_told_apart():
    rows, columns = np.mgrid[:60, :60]
    masks = {
        "square": np.maximum(abs(rows - 30), abs(columns - 30)) <= 14,
        "tilted square": abs(rows - 30) + abs(columns - 30) <= 20,
        "strip": (abs(rows - 30) <= 4) & (abs(columns - 30) <= 25),
        "disc": np.hypot(rows - 30, columns - 30) <= 15,
        "river": abs(rows - 30 - 12 * np.sin(columns / 6)) <= 3,
    }
    detector = Knows({})
    detector.known = {"thing": tuple(Detected.of_mask(name, mask, 1.0) for name, mask in masks.items())}
    image = blank(60)

    def of_shape(shape):
        answer = Interpreter(detector).run(parse(f'count({shape}(find("thing")))'), image)
        return {of.concept for of in answer.evidence.objects}

    assert of_shape("square") == {"square", "tilted square"}
    assert of_shape("rectangular") == {"square", "tilted square", "strip"}
    assert of_shape("circular") == {"disc"}


@quick
@given(st.lists(boxes, min_size=1, max_size=4))
def test_a_shape_is_that_of_all_its_corners(some):
    mask = np.zeros((SIDE, SIDE), bool)
    for top, left, bottom, right in some:
        mask[top:bottom, left:right] = True
    rows, columns = np.nonzero(mask)
    corners = [(rows + i, columns + j) for i in (0, 1) for j in (0, 1)]
    hull = shapely.MultiPoint(np.concatenate([np.stack(of, axis=1) for of in corners])).convex_hull
    made = Detected.of_mask("thing", mask, 1.0).shape
    assert mask.sum() / made[0] == pytest.approx(hull.minimum_rotated_rectangle.area)
    circle = np.pi * shapely.minimum_bounding_radius(hull) ** 2
    assert made[2] == pytest.approx(mask.sum() / circle)


def test_the_shape_of_a_large_object_takes_little_memory():
    of = Detected("field", 0, 0, np.ones((1500, 1500), bool), 1.0)
    tracemalloc.start()
    try:
        assert of.shape[:2] == pytest.approx((1, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Not a corner for each of its pixels.
    assert peak < 4 * of.mask.nbytes


def test_texts_are_chosen():
    world = {"house": [(0, 0, 9, 9)], "lake": [(20, 20, 22, 22)]}
    assert ask(f'choose(more(area({A}), area({B})), "houses", "lakes")', world) == "houses"
    assert ask('classify("wood", "water")', world) == "water"


def test_a_concept_is_looked_for_once_and_a_name_is_run_once():
    detector = Knows({"house": [(0, 0, 4, 4)]})
    doubling = "".join(f"a{n + 1} = union(a{n}, a{n})\n" for n in range(18))
    program = parse(f'a0 = union({A}, find("House"))\n{doubling}add(count(a18), count({A}))')
    answer = Interpreter(detector).run(program, blank())
    assert answer.value == 2
    assert detector.asked == ["house"]
    assert len(answer.evidence.steps) < 30
    assert all(len(step.call) < 2000 for step in answer.evidence.steps)


def test_evidence_is_what_was_counted_what_else_was_found_and_why():
    world = {"house": [(0, 0, 4, 4), (30, 0, 34, 4)], "lake": [(15, 0, 20, 40)], "road": [(0, 30, 40, 32)]}
    answer = run(f"count(north_of({A}, {B}))", world)
    assert (answer.value, answer.text, answer.kind) == (1, "1", "count")
    assert [of.top for of in answer.evidence.objects] == [0]
    assert {of.concept for of in answer.evidence.others} == {"house", "lake"}
    assert [(of.relation, of.one.top, of.other.concept) for of in answer.evidence.links] == [
        ("north_of", 0, "lake")
    ]
    assert [step.shown for step in answer.evidence.steps] == ["2 objects", "1 object", "1 object", "1"]
    assert run(f"exists({A})", world).text == "yes"
    assert run(f"area({B})", world).text == "800 m2"
    assert run(f"share({B})", world).text == "12.5 %"


def test_a_run_ends_when_its_time_is_up():
    class Endless(Knows):
        def find(self, image, concept, tick):
            while True:
                tick()

    with pytest.raises(ProgramError, match=r"column 7: the program took more than 0\.01 s"):
        Interpreter(Endless({}), Limits(seconds=0.01)).run(parse(f"count({A})"), blank())


def test_a_run_ends_within_a_crowd_of_slow_objects():
    looked_at = []

    class Slow(Detected):
        @property
        def shape(self):
            looked_at.append(self)
            time.sleep(0.02)
            return 1.0, 1.0, 1.0

    detector = Knows({})
    detector.known = {"house": tuple(Slow("house", 0, n, np.ones((1, 1), bool), 1.0) for n in range(100))}
    for shape in ("square", "rectangular", "circular"):
        looked_at.clear()
        with pytest.raises(ProgramError, match="took more than"):
            Interpreter(detector, Limits(seconds=0.1)).run(parse(f"count({shape}({A}))"), blank())
        assert 0 < len({id(of) for of in looked_at}) < 100


def test_large_images_and_crowds_are_refused():
    world = {"house": [(0, 0, 1, 1)] * 5}
    with pytest.raises(ProgramError, match="5 objects of 'house', more than 4"):
        run(f"count({A})", world, objects=4)
    with pytest.raises(InputError, match="1,600 pixels, more than 1,000"):
        run(f"count({A})", world, pixels=1000)
    with pytest.raises(InputError, match="metres per pixel"):
        Image(np.zeros((4, 4, 3), np.uint8), 0.0)
    with pytest.raises(InputError, match="RGB"):
        Image(np.zeros((4, 4), np.uint8), 1.0)


KINDS = {"truth": bool, "count": int, "text": str}


@quick
@given(worlds, st.data())
def test_any_program_gives_an_answer_of_its_kind(world, data):
    """Every operation once, its arguments the simplest of their kinds."""
    simple = {"objects": A, "truth": f"exists({B})", "text": '"north"', "number": f"count({B})"}
    of = data.draw(st.sampled_from(list(OPERATIONS.values())))
    given_ = ['"lake"' if p.is_literal and of.name == "find" else simple[p.kind] for p in of.parameters]
    if of.name in ("near", "sized"):
        given_ = [simple["objects"], *(["10", "20"] if of.name == "sized" else [B, "10"])]
    text = f"{of.name}({', '.join(given_ * (2 if of.is_repeated else 1))})"
    if of.result == "objects":
        text = f"count({text})"
    program = parse(text)
    value = run(text, world).value
    if isinstance(value, Unknown):
        assert of.name in ("distance", "choose")
        return
    assert type(value) is KINDS.get(program.kind, float)
    if program.kind in QUANTITIES:
        assert value >= 0
