"""Checks, offline, that the environment is the one that was tested: every package pinned, in range and as installed.

Known vulnerabilities are not its business: `make audit` asks for them, which needs the network.
"""

import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = "graft-pipeline"
#: What an environment is made with, before anything is installed into it.
GIVEN = {"pip", "setuptools", "wheel"}


def pins(text: str) -> tuple[dict[str, str], list[str]]:
    """Versions by package of a constraints file, and what is wrong with its lines."""
    versions: dict[str, str] = {}
    problems = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        (specifier, *more) = requirement.specifier or [None]
        if specifier is None or more or specifier.operator != "==" or "*" in specifier.version:
            problems.append(f"constraints.txt: {line} is no exact pin: write {name}==VERSION.")
            continue
        if name in versions:
            problems.append(f"constraints.txt: {name} is there twice: keep one.")
        versions[name] = specifier.version
    return versions, problems


def of_project(text: str) -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included."""
    project = tomllib.loads(text)["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != PROJECT]


def installed_for(requirements: list[Requirement]) -> dict[str, str]:
    """Versions of what is installed of the requirements and of all that they ask for."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # An extra that this environment does without.
            continue
        versions[name] = distribution.version
        for line in distribution.requires or []:
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                todo += [(inner, wanted) for wanted in ("", *inner.extras)]
    return versions


def problems(pyproject: str, constraints: str) -> list[str]:
    """All that is wrong, a line each; every line says what to do."""
    pinned, found = pins(constraints)
    requirements = of_project(pyproject)
    for requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None:
            found.append(f"{requirement.name} is not pinned: add it to constraints.txt.")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(
                f"{requirement.name}=={version} is not {requirement.specifier}: change pin or range."
            )
    for name, version in sorted(installed_for(requirements).items()):
        if name in GIVEN:
            continue
        if name not in pinned:
            found.append(
                f"{name}=={version} comes with a requirement and is not pinned: add it to constraints.txt."
            )
        # A build for another accelerator, 2.12.1+cpu, is the same version.
        elif version.partition("+")[0] != pinned[name]:
            found.append(
                f"{name}=={version} is installed, {pinned[name]} is pinned: make install, or move the pin."
            )
    return list(dict.fromkeys(found))


def main() -> int:
    """Print the problems; 1 if there is one."""
    found = problems((ROOT / "pyproject.toml").read_text(), (ROOT / "constraints.txt").read_text())
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
