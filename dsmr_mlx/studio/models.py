"""Models by name: which are offered, and those that are loaded."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from dsmr_mlx.common.errors import UserError, did_you_mean
from dsmr_mlx.generation.foresight import why_no_gaps
from dsmr_mlx.generation.options import recommended_options
from dsmr_mlx.generation.player_file import weights_digest
from dsmr_mlx.live.vocabularies import live_ids
from dsmr_mlx.model import bundled
from dsmr_mlx.model.checkpoint import load, resolve
from dsmr_mlx.model.checkpoint_folder import is_checkpoint_or_run
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.studio.settings import as_settings
from dsmr_mlx.tokenizers.base import Tokenizer

KEPT = 2  # models in memory
MAX_SEARCHED = 500  # entries of a folder
PLACES = (".", "runs", "checkpoints")  # folders below the current one in which models are looked for


@dataclass(frozen=True)
class LoadedModel:
    """A model, its vocabulary and the options that it recommends.

    key: differs between weights, types of numbers and vocabularies
    """

    name: str
    model: DSMR
    tokenizer: Tokenizer
    recommended: dict[str, Any]
    key: str

    @property
    def why_not_live(self) -> str:
        """Why it cannot play a duet; empty if it can."""
        try:
            live_ids(self.tokenizer)
        except UserError as error:
            return str(error)
        return ""

    @property
    def why_no_gaps(self) -> str:
        """Why it cannot be shown what follows a gap; empty if it can."""
        return why_no_gaps(self.model, self.tokenizer)

    def require_clock(self) -> None:
        """Raise `UserError` if the times of its notes are unknown while they are made."""
        grammar = self.tokenizer.event_grammar()
        if self.tokenizer.why_not:
            raise UserError(f"model {self.name}: {self.tokenizer.why_not}")
        if grammar is None or not grammar.has_clock:
            reason = "its tokens have no known duration"
        elif not grammar.plays_keys:
            reason = "it plays several instruments, or keys that are not known one by one"
        else:
            return
        raise UserError(
            f"model {self.name}: tokenizer {self.tokenizer.label}: {reason}; `dsmr-mlx generate` can play it"
        )


class Models:
    """The models that are offered: those named, the bundled ones, and those in the current folder.

    Only one thread calls `load`. Raises `UserError` if a name is not that of a model.
    """

    def __init__(self, named: Sequence[str] = (), folder: Path | None = None):
        self.folder = Path() if folder is None else folder
        for name in named:
            resolve(name)
        self.names = list(dict.fromkeys([*named, *bundled.names(), *self._found()]))
        if not self.names:
            raise UserError("no model given, and this installation has no bundled one: expected a checkpoint or a run")
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()

    def _found(self) -> list[str]:
        """The checkpoints and runs in the current folder, as relative paths."""
        found = []
        for place in PLACES:
            folder = self.folder / place
            entries = sorted(folder.iterdir())[:MAX_SEARCHED] if folder.is_dir() else []
            found += [entry for entry in entries if entry.is_dir() and is_checkpoint_or_run(entry)]
        return [str(path) for path in found]

    @property
    def default(self) -> str:
        """The name of the model that plays if none is chosen."""
        return self.names[0]

    def check(self, name: str) -> None:
        """Raise `UserError` for a name that is not offered."""
        if name not in self.names:
            raise UserError(f"`model` {name}: no such model{did_you_mean(name, self.names)}")

    def load(self, name: str | None, loading: Callable[[str], None] = lambda name: None) -> LoadedModel:
        """Return a model, None for the default one; `loading(name)` is called if it is read from disk.

        Raises `UserError` that names it if it is not offered or damaged.
        """
        name = self.default if name is None else name
        self.check(name)
        if name not in self._loaded:
            loading(name)
            model, tokenizer = load(name)
            dtype = str(model.embed.weight.dtype)
            key = f"{weights_digest(model)} {dtype} {tokenizer.fingerprint[:16]}"
            loaded = LoadedModel(name, model, tokenizer, recommended_options(name), key)
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
                mx.clear_cache()
            self._loaded[name] = loaded
        self._loaded.move_to_end(name)
        return self._loaded[name]

    @property
    def keys(self) -> set[str]:
        """The keys of the models in memory."""
        return {loaded.key for loaded in self._loaded.values()}

    def describe(self) -> list[dict[str, Any]]:
        """Return what clients may know of each model."""
        return [self._describe(name, self._loaded.get(name)) for name in list(self.names)]

    def _describe(self, name: str, loaded: LoadedModel | None) -> dict[str, Any]:
        card = bundled.load_card(name) if name in bundled.names() else None
        try:
            recommended = recommended_options(name)
        except UserError:
            recommended = {}
        return {
            "name": name,
            "title": Path(name).name or name,
            "bundled": card is not None,
            "loaded": loaded is not None,
            "gaps": None if loaded is None else not loaded.why_no_gaps,
            "live": None if loaded is None else not loaded.why_not_live,
            "recommended": as_settings(recommended),
            "licence": card and card.notice,
        }
