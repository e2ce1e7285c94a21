"""The errors that a user can mend."""


class UsageError(ValueError):
    """What a user asked for or gave us cannot be used.

    The message is one line: what is wrong, in which file or flag, and what to do. A command prints it
    and ends with status 2 (run/cli.py).
    """


class OtherArchitecture(UsageError):
    """A checkpoint that model.py does not compute, but transformers may (beyond/foreign.py)."""
