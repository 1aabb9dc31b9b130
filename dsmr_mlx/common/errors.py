"""The error raised for invalid user input, and "did you mean" hints."""

from collections.abc import Iterable


class UserError(ValueError):
    """Raised for invalid user input.

    The message is one line that names the file or argument, the value found and what is valid. Arguments are written
    in backquotes, `like_this`; the command line shows them as its options, --like-this, and exits with code 2.
    """


MAX_SHOWN = 200  # characters of a value in a message


class SettingError(UserError):
    """Raised for an invalid value of a setting; `expected` says what is valid."""

    def __init__(self, name: str, value: object, expected: str):
        super().__init__(f"{name} = {shortened(value)}: expected {expected}")
        self.expected = expected


def shortened(value: object) -> str:
    """Return the repr of a value, cut after `MAX_SHOWN` characters; files may hold values of any length."""
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for the end of a message: ", did you mean X?" with the nearest known name, or "" if none is near.

    Case and the kind of dashes are ignored.
    """
    import difflib  # only needed for errors

    plain = {_plain(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.7)
    return f", did you mean {plain[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").strip("-")
