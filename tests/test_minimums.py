"""The lowest releases that pyproject.toml allows are those of constraints-minimum.txt."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USED = ("downstream", "spatialdata", "visium-hd", "transformers")  # extras that the package itself imports
NEEDED = [
    text
    for part in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in USED))
    for text in part
    if not text.startswith("genar[")
]


def same(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version):
    return [int(part) for part in version.split(".")]


LINES = (ROOT / "constraints-minimum.txt").read_text().splitlines()
LOWEST = dict(line.split("==") for line in LINES if not line.startswith("#"))


@pytest.mark.parametrize("text", NEEDED)
def test_every_dependency_has_a_minimum_and_the_list_agrees(text):
    name, least = re.fullmatch(r"([\w.-]+)>=([\d.]+)", text).groups()
    lowest = LOWEST[same(name)]
    assert numbers(lowest)[: len(numbers(least))] == numbers(least), f"{text}, but the list has {lowest}"


def test_the_list_holds_no_other_package():
    assert set(LOWEST) == {same(re.split(r"[<>=]", text)[0]) for text in NEEDED}
