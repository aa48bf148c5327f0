"""Tissue sections as AnnData: find them on disk, read them, check them. The format is told from the contents."""

from genar.data import contract
from genar.data.formats import SectionRef, find_sections, options_for, pick, read_section, read_sections, without
from genar.data.reading import ReadOptions
from genar.data.sections import Sections, read_places
from genar.data.slide import Slide, open_slide

__all__ = [
    "ReadOptions",
    "SectionRef",
    "Sections",
    "Slide",
    "contract",
    "find_sections",
    "open_slide",
    "options_for",
    "pick",
    "read_places",
    "read_section",
    "read_sections",
    "without",
]
