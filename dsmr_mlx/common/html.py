"""HTML as text: escaped text, elements, and the colours of pages as custom properties."""

import re
from collections.abc import Mapping
from html import escape

from dsmr_mlx.common.plotting import DARK, LIGHT

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(value: object) -> str:
    """Return a value as the text of an element or attribute; characters that XML cannot hold are replaced."""
    return escape(NOT_XML.sub("\ufffd", str(value)))


def element(name: str, *content: str, **attributes: object) -> str:
    """Return one element. The content is markup, the attributes are plain text.

    `class_` stands for the attribute class; an attribute that is None is left out.
    """
    given = {key.rstrip("_"): value for key, value in attributes.items() if value is not None}
    opening = name + "".join(f' {key}="{text(value)}"' for key, value in given.items())
    return f"<{opening}>{''.join(content)}</{name}>" if content else f"<{opening}/>"


def variables(colours: Mapping[str, str]) -> str:
    """Return colours as the custom properties of a style sheet."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


SCHEMES = (
    f":root {{ color-scheme: light dark; {variables(LIGHT)} }} "
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}"
)
