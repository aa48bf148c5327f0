"""Sphinx: the pages are MyST Markdown, the reference comes from docstrings."""

from pathlib import Path

import typer

import genar
from genar.cli import app

project = "GenAR"
author = "The GenAR founders"
release = version = genar.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"GenAR {release}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
nitpicky = False
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository beside docs/


def write_commands(path: Path) -> None:
    """The options of every command, from the command line itself, as Markdown."""
    lines = []
    for name, command in typer.main.get_command(app).commands.items():  # pyright: ignore
        lines += [f"## genar {name}", "", " ".join(command.help.split()), "", "| option | what |", "| --- | --- |"]
        for one in command.params:
            if one.name == "help":
                continue
            written = ", ".join(one.opts) if one.param_type_name == "option" else one.name.upper()
            told = (getattr(one, "help", None) or "").replace("|", "\\|").replace("<", "&lt;")
            default = (
                "" if one.default in (None, "", False, ...) or "[default" in told else f" [default: {one.default}]"
            )
            lines.append(f"| `{written}` | {told}{default} |")
        lines.append("")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


write_commands(Path(__file__).parent / "_build" / "commands.txt")
