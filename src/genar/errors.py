"""What a command tells its user in one line."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was expected, what was found, where, and what to do."""


class LostProcessError(RuntimeError):
    """One of the processes of a run is gone; the others have stopped, and the run can be gone on with."""
