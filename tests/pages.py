"""The code blocks of a page of the documentation, run as they stand."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str) -> dict:
    """The names that the Python blocks of docs/``name`` leave behind, run one after the other in the current folder."""
    page, names = DOCS / name, {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names
