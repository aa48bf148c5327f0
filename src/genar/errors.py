"""The one error that says: the input is wrong, not the program."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was expected, what was found, where, and what to do."""
