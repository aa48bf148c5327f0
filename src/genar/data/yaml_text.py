"""YAML of a user's: plain values alone, and no text that grows as it is read."""

from typing import Any

import yaml

from genar.errors import InputError

_LONGEST, _MOST = 1 << 18, 100_000  # characters of the text, values in it once its references are followed


def load_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises ``InputError`` where it is longer than any settings are, or its references (``*name``) repeat each other into
    more values than it could be meant to hold; ``yaml.YAMLError`` or ``ValueError`` where it is no YAML.
    """
    if len(text) > _LONGEST:
        raise InputError(f"a YAML text of {len(text):,} characters; expected settings, at most {_LONGEST:,}")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _n_values(node, {}) > _MOST:
            raise InputError("its references (*name) repeat each other without end; write the values out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _n_values(node, known: dict[int, int]) -> int:
    """Values under a node, each reference counted as what it names; one within itself as too many."""
    if id(node) not in known:
        known[id(node)] = _MOST + 1  # until it is counted: who comes back to it here is in a circle
        parts = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(node)]
