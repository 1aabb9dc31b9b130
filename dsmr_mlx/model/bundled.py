"""The models that come with the program: `dsmr_mlx/model/weights/NAME`, each an ordinary checkpoint folder with more in it.

    card.json         what is known of the model, see `BundledModel`
    generation.json   the options that it is best played with, see `generation_options`
    README.md         the model card
    LICENSE           of the weights, which is not that of the code

A name of one of them stands for its folder wherever a checkpoint is expected. Needs no MLX.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.files import read_json
from dsmr_mlx.model.checkpoint_folder import GENERATION
from dsmr_mlx.model.config import ModelConfig

FOLDER = Path(__file__).parent / "weights"
DEFAULT = "asap-small"
CARD = "card.json"
CODE_LICENCE = "MIT"


@dataclass(frozen=True)
class BundledModel:
    """A model that comes with the program.

    path: its checkpoint folder; horizons: M_l of each layer, in tokens; data: what it was trained on; tokens: that it
    has seen in training, augmented ones counted as often as they came; perplexity: of the whole `split` of that data,
    pieces streamed; licence: of the weights, an SPDX name; terms: what that means, in a line; bytes: of the weights
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
        """JSON values."""
        return asdict(self) | {"path": str(self.path), "default": self.name == DEFAULT}

    @property
    def notice(self) -> str:
        """Whose the model is, in a line, and that the program is under another licence."""
        return (
            f"{self.name}: trained on {self.data}; weights {self.licence}, {self.terms}; the program is {CODE_LICENCE}"
        )


def names() -> list[str]:
    """The names of the bundled models, the default first."""
    found = sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD}"))
    return sorted(found, key=lambda name: name != DEFAULT)


def locate(checkpoint: str | Path | None) -> Path:
    """A path as it is; the folder of a bundled model for its name, where there is no such path, and of the default for
    None. Raises `UserError` for None where no model is bundled.
    """
    if checkpoint is None:
        if DEFAULT not in names():
            raise UserError(f"no checkpoint given, and this installation lacks the bundled {DEFAULT}: expected one")
        return FOLDER / DEFAULT
    path = Path(checkpoint)
    if str(path) in names() and not path.exists():
        return FOLDER / path
    return path


def bundled(folder: str | Path) -> BundledModel | None:
    """What is known of the bundled model whose folder this is; None for any other folder."""
    folder = Path(folder)
    found = (name for name in names() if folder.exists() and folder.samefile(FOLDER / name))  # links are followed
    return next(map(describe, found), None)


def describe(name: str) -> BundledModel:
    """What is known of a bundled model. Raises `UserError` for a name that there is not, and a damaged card."""
    if name not in names():
        raise UserError(f"{name}: no bundled model, expected one of {', '.join(names()) or 'none'}")
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
        raise UserError(f"{folder / CARD}: damaged, no {error} where one is expected") from None


def generation_options(folder: str | Path) -> dict[str, Any]:
    """The options of `generate` that a checkpoint folder recommends in `generation.json`, by name; {} without one.

    Raises `UserError` for a file that cannot be read.
    """
    path = Path(folder) / GENERATION
    if not path.is_file():
        return {}
    options = read_json(path, "options of generate")
    if not isinstance(options, dict):
        raise UserError(f"{path}: holds {json.dumps(options)}, expected options by name")
    return options
