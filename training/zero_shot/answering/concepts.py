"""Concepts as questions name them: their singular, the words that stand for them, the classes that they are.

How words are found in an image is in detection.py; classes and prompts are in zero_shot/prompts.py.
"""

import json
from functools import lru_cache
from importlib import resources

from graft_pipeline.osm_labels import osm_classes
from training.zero_shot.prompts import PromptSet

_ARTICLES = ("a ", "an ", "the ", "any ", "some ")
#: Plurals that no rule makes, and words that only look like plurals.
_IRREGULAR = {
    "people": "person", "children": "child", "leaves": "leaf", "shelves": "shelf", "houses": "house",
    "warehouses": "warehouse", "greenhouses": "greenhouse", "courses": "course", "horses": "horse", "bases": "base",
    "bridges": "bridge", "canoes": "canoe", "shoes": "shoe", "trees": "tree",
    "grass": "grass", "glass": "glass", "tennis": "tennis", "bus": "bus", "campus": "campus", "greens": "green",
    "railroad tracks": "railroad track", "moss": "moss", "canvas": "canvas", "gas": "gas",
}  # fmt: skip


def singular(noun: str) -> str:
    """A noun phrase without article, in the singular, lower case: `the crop fields` is `crop field`.

    Args:
        noun: English noun phrase.

    Returns:
        The concept as programs spell it; what is singular already stays as it is.
    """
    words = " ".join(noun.lower().split())
    for article in _ARTICLES:
        words = words.removeprefix(article)
    start, _, last = words.rpartition(" ")
    return f"{start} {_singular_word(last)}".strip()


def _singular_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 3 or word.endswith(("ss", "us", "is")) or not word.endswith("s"):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zes")):
        return word[:-2]
    return word[:-1]


@lru_cache(maxsize=1)
def _table() -> dict[str, tuple[str, ...]]:
    source = resources.files(__package__) / "concepts.json"
    return {key: tuple(words) for key, words in json.loads(source.read_text(encoding="utf-8")).items()}


def words_of(concept: str) -> tuple[str, ...]:
    """Words that a concept is looked for with, from `concepts.json`.

    Args:
        concept: in the singular.

    Returns:
        Other words for it and for what it consists of; what has no entry stands for itself.
    """
    return _table().get(concept, (concept,))


def is_known(noun: str) -> bool:
    """Whether a noun is one of `concepts.json` or a class of OpenStreetMap's, in the singular or plural.

    Args:
        noun: English noun phrase.

    Returns:
        False for what may be a thing, too: any words can be looked for.
    """
    return singular(noun) in _known()


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    words = (word for of in osm_classes() for word in (of.name, *of.words))
    return frozenset(map(singular, (*words, *_table(), *(of for some in _table().values() for of in some))))


def classes_of(concept: str, vocabulary: PromptSet) -> tuple[int, ...]:
    """Which classes of a vocabulary a concept is.

    Args:
        concept: in the singular.
        vocabulary: classes and their words.

    Returns:
        Numbers of the class of that name or word; else of all that its words name; empty: it is another thing.
    """
    known = {
        number: {singular(name), *map(singular, words)}
        for number, (name, words) in enumerate(vocabulary.classes.items())
    }
    for wanted in ({concept}, set(map(singular, words_of(concept)))):
        if found := tuple(number for number, of in known.items() if wanted & of):
            return found
    return ()
