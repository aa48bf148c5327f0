"""The code blocks of a page of the documentation, run as they stand."""

import re
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str, shell: Callable[[str], None] | None = None) -> dict:
    """The names that the Python blocks of docs/``name`` leave behind, run one after the other in the current folder;
    ``shell`` takes the bash blocks between them."""
    page, names = DOCS / name, {}
    for kind, block in re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
        elif shell is not None:
            shell(block)
    return names
