"""Who plays."""

from enum import StrEnum


class Voice(StrEnum):
    """The two that take turns."""

    HUMAN = "human"
    MODEL = "model"
