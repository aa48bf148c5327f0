"""What a command tells its user in one line."""

import signal
from collections.abc import Collection


class InputError(ValueError):
    """Bad input: the message is one line that says what was expected, what was found, where, and what to do.

    >>> try:
    ...     genar.read_section("nowhere.h5ad")
    ... except genar.InputError as error:
    ...     print(error)
    nowhere.h5ad: no such file or folder
    """


class NoRawCountsError(InputError):
    """A section that holds other things than raw counts, or none."""


class SectionWarning(UserWarning):
    """What a reader must know of a section that can be read."""


class LostProcessError(RuntimeError):
    """One of the processes of a run is gone; the others have stopped, and what they did can be gone on with."""


class StoppedError(RuntimeError):
    """Somebody asked a run to stop by a signal; all that the next start needs is written."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; start the same command again to go on")
        self.exit_code = 128 + signum


def first_names(names: Collection, n: int = 3) -> str:
    """The first ``n`` names, for a message.

    >>> first_names(["A", "B", "C", "D"])
    'A, B, C, …'
    """
    return ", ".join(str(name) for name in list(names)[:n]) + (", …" if len(names) > n else "")


def named(names: Collection) -> str:
    """All names; of many their number and the first.

    >>> named(["A", "B"]), named([]), named(range(200))
    ('A, B', 'none', '200 (0, 1, 2, …)')
    """
    return f"{len(names)} ({first_names(names)})" if len(names) > 12 else first_names(names, 12) or "none"
