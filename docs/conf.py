"""Sphinx: the pages are MyST Markdown, the reference comes from docstrings."""

import sys
from pathlib import Path

import genar

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from generated import command_tables, renew, setting_tables  # noqa: E402

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

renew(DOCS / "commands.md", command_tables())
renew(DOCS / "settings.md", setting_tables())
