"""The one class of errors that a user can mend, and JSON files, with which much can be wrong."""

import json
from pathlib import Path


class UsageError(ValueError):
    """What a user asked for or gave us cannot be used.

    The message is one line: what is wrong, in which file or flag, and what to do. A command prints it
    and ends with status 2 (run/cli.py).
    """


def read_json(file: Path) -> dict:
    """The JSON object in a file; UsageError if there is none."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a ValueError is also what is no UTF-8
        raise UsageError(f"{file}: not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{file}: not a JSON object")
    return raw
