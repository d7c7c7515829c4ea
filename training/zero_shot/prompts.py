"""Prompt sets: names of classes and templates around them, read from the JSON files in prompt_sets/.

How prompts become class embeddings is in classify.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from graft_pipeline.errors import InputError
from graft_pipeline.osm_labels import osm_classes

#: Of sets that are words alone.
_TEMPLATES = ("a photo of {}", "{}", "a view of {}")


@dataclass(frozen=True)
class PromptSet:
    """Words for each class, and sentences to put them into.

    Attributes:
        classes: class name to the words that stand for it.
        templates: sentences with one `{}`.
    """

    classes: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        """Reject sets that would give a class no prompt."""
        if not self.classes or not all(self.classes.values()) or not self.templates:
            raise InputError("A prompt set needs at least one class, one word per class and one template.")
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong:
            raise InputError(f"Templates need exactly one {{}}: correct {wrong}.")

    @classmethod
    def of_words(cls, words: Sequence[str]) -> "PromptSet":
        """A set of classes that are their own words, in the templates that every set of ours has.

        Args:
            words: one class each.

        Returns:
            The set.

        Raises:
            InputError: if there is no word.
        """
        return cls({word: (word,) for word in words}, _TEMPLATES)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in order: class i of a prediction is names[i]."""
        return tuple(self.classes)

    def prompts(self) -> dict[str, list[str]]:
        """Every template with every word, per class."""
        return {
            # Not formatted: a sentence may hold other braces.
            name: [template.replace("{}", word) for word in words for template in self.templates]
            for name, words in self.classes.items()
        }

    def restricted_to(self, names: list[str] | tuple[str, ...]) -> "PromptSet":
        """The same set with some of its classes, in the order given.

        Args:
            names: class names; a name without an entry stands for itself.

        Returns:
            The set.
        """
        return PromptSet({name: self.classes.get(name, (name,)) for name in names}, self.templates)


def load_prompts(name: str | Path) -> PromptSet:
    """Read a prompt set.

    Args:
        name: `planet`, `eurosat` ..., a file in prompt_sets/; `naip_osm`, the words of osm_classes.json; or a JSON
            file with `templates` (list) and `classes` (name to list of words).

    Returns:
        The set.

    Raises:
        InputError: if there is no such set, or it is malformed.
    """
    if name == "naip_osm":
        return PromptSet({of.name: of.words for of in osm_classes()}, _TEMPLATES)
    builtin = resources.files(__package__) / "prompt_sets"
    source = Path(name) if str(name).endswith(".json") else builtin / f"{name}.json"
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        classes = {key: _texts(words, key) for key, words in content["classes"].items()}
        return PromptSet(classes, _texts(content["templates"], "templates"))
    except FileNotFoundError as error:
        known = sorted(
            file.name.removesuffix(".json") for file in builtin.iterdir() if file.name.endswith(".json")
        )
        raise InputError(
            f"No prompt set {str(name)!r}: use one of {', '.join(known)}, or a JSON file."
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"{source} is no prompt set ({error!r}): it needs `classes` and `templates`, in UTF-8."
        ) from error


def _texts(values: Any, what: str) -> tuple[str, ...]:
    # A word in place of a list of words would be taken for its letters.
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        raise TypeError(f"{what} is no list of words")
    return tuple(values)
