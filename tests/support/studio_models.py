"""Tiny models for the studio, and work without a server."""

from pathlib import Path

from support.checkpoints import save
from support.studio import Recorder

from dsmr_mlx.studio.models import Models
from dsmr_mlx.studio.session import Session
from dsmr_mlx.studio.states import States
from dsmr_mlx.studio.work import Work
from dsmr_mlx.tokenizers.performance import PerformanceTokenizer
from dsmr_mlx.tokenizers.registry import make_tokenizer

VOCABULARIES = {"tiny": "performance", "other": "performance", "aria": "aria:2675", "REMI": "miditok:REMI"}


def save_tiny(folder: Path, name: str = "tiny") -> str:
    """Write a tiny random checkpoint with one of `VOCABULARIES`; return its path."""
    kind = VOCABULARIES.get(name, name)
    tokenizer = PerformanceTokenizer() if kind == "performance" else make_tokenizer(kind)
    seed = sorted(VOCABULARIES).index(name) if name in VOCABULARIES else 0
    save(folder / name.replace(":", "-"), tokenizer, seed=seed)
    return str(folder / name.replace(":", "-"))


def tiny_models(folder: Path, *names: str) -> Models:
    """Models of which the first is the default one; the bundled ones are offered too."""
    return Models([save_tiny(folder, name) for name in names or ("tiny",)], folder)


def make_work(folder: Path, *names: str) -> tuple[Work, Recorder]:
    """Work on a new session with tiny models, and what is published."""
    published = Recorder()
    session = Session(folder / "session.studio", published)
    return Work(session, tiny_models(folder, *names), States(), published), published
