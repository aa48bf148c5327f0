"""GenAR: raw gene counts of every spot of a tissue slide, generated from its H&E image scale by scale."""

__version__ = "0.1.0"
