"""The models that come with the program, checkpoint folders in `dsmr_mlx/model/weights/NAME` with additional files.

    card.json         facts about the model, see `BundledModel`
    generation.json   recommended options, see `checkpoint_folder.generation_options`
    README.md         the model card
    LICENSE           of the weights; it differs from that of the code

Wherever a checkpoint is expected, a bundled model can be given by its name. Needs no MLX.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json
from dsmr_mlx.model.config import ModelConfig

FOLDER = Path(__file__).parent / "weights"
DEFAULT = "maestro-small"
CARD = "card.json"
CODE_LICENCE = "MIT"


@dataclass(frozen=True)
class BundledModel:
    """A model that comes with the program.

    path: its checkpoint folder
    horizons: M_l of each layer, in tokens
    data: what it was trained on
    tokens: number seen in training; repeated and augmented tokens count each time
    perplexity: of whole, streamed pieces of the `split` of that data; the card has their number
    licence: of the weights, an SPDX name
    terms: what the licence means, in one line
    bytes: of the weights
    """

    name: str
    path: Path
    parameters: int
    horizons: list[int]
    data: str
    tokens: int
    perplexity: float
    split: str
    licence: str
    terms: str
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"path": str(self.path), "default": self.name == DEFAULT}

    @property
    def notice(self) -> str:
        """The data, the licence of the weights and that of the program, in one line."""
        return (
            f"{self.name}: trained on {self.data}; weights {self.licence}, {self.terms}; the program is {CODE_LICENCE}"
        )


def names() -> list[str]:
    """Return the names of the bundled models, the default first."""
    found = sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD}"))
    return sorted(found, key=lambda name: name != DEFAULT)


def locate(checkpoint: str | Path | None) -> Path:
    """Return the path of a checkpoint, which may be the name of a bundled model; None is the default model.

    An existing path takes precedence over a name. Raises `UserError` for None if the default model is not installed.
    """
    if checkpoint is None:
        if DEFAULT not in names():
            raise UserError(f"no checkpoint given, and this installation lacks the bundled {DEFAULT}: expected one")
        return FOLDER / DEFAULT
    path = Path(checkpoint)
    if str(path) in names() and not path.exists():
        return FOLDER / path
    return path


def find_by_folder(folder: str | Path) -> BundledModel | None:
    """Return the bundled model in this folder, or None. Links are followed."""
    folder = Path(folder)
    found = (name for name in names() if folder.exists() and folder.samefile(FOLDER / name))
    return next(map(load_card, found), None)


def load_card(name: str) -> BundledModel:
    """Read the card of a bundled model. Raises `UserError` for an unknown name and a damaged card."""
    if name not in names():
        raise UserError(f"{name}: not a bundled model, expected one of {', '.join(names()) or 'none'}")
    folder = FOLDER / name
    card, config = read_json(folder / CARD, "a model card"), ModelConfig.load(folder / "config.json")
    try:
        return BundledModel(
            name=name,
            path=folder,
            parameters=card["parameters"],
            horizons=config.horizons,
            data=card["data"]["name"],
            tokens=card["training"]["tokens"],
            perplexity=card["evaluation"]["perplexity"],
            split=card["evaluation"]["split"],
            licence=card["licence"]["id"],
            terms=card["licence"]["terms"],
            bytes=(folder / "model.safetensors").stat().st_size,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD}: damaged, {error} is missing") from None
