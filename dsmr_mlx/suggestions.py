"""What something misspelt may have been meant to be."""

from collections.abc import Iterable


def meant(name: str, known: Iterable[str]) -> str:
    """The end of an error's message: `, did you mean X?` for the known name that is nearest, upper and lower case and
    kinds of dashes aside; nothing where none is near.
    """
    import difflib  # seldom needed

    plain = {_plain(candidate): candidate for candidate in known}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.7)
    return f", did you mean {plain[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").strip("-")
