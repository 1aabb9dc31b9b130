"""Show a model what follows a gap before it plays the gap; the format is that of training, see `data.gaps`."""

import numpy as np

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.data.gaps import show
from dsmr_mlx.model.dsmr import DSMR
from dsmr_mlx.music.gapped import MAX_GAP_SECONDS
from dsmr_mlx.music.notes import Notes
from dsmr_mlx.tokenizers.base import Tokenizer
from dsmr_mlx.tokenizers.event_grammar import Moment
from dsmr_mlx.tokenizers.performance import MAX_SHIFT, TICKS_PER_SECOND
from dsmr_mlx.tokenizers.token_tables import TokenTables


def why_no_gaps(model: DSMR, tokenizer: Tokenizer) -> str:
    """Why a model cannot be shown what follows a gap; empty if it can."""
    if tokenizer.fill_id is None:
        return f"its vocabulary {tokenizer.label} has no FILL and PLAY, so it cannot be shown what follows a gap"
    if not model.config.fill:
        return "it does not read what follows a gap (fill is 0 in its config.json)"
    return ""


def shown_ids(tokenizer: Tokenizer, notes: Notes, gap: float, events: int) -> np.ndarray:
    """The ids `(T,)` that show what follows a gap, from FILL to PLAY; arguments and errors as in `Player.foresee`."""
    ticks = round(gap * TICKS_PER_SECOND) if 0 < gap <= MAX_GAP_SECONDS else 0
    if ticks < 1:
        raise UserError(f"`gap` {gap:g}: expected more than 0 and at most {MAX_GAP_SECONDS:,} seconds")
    # A length of whole seconds would be ambiguous before an excerpt that begins with a pause.
    early = int(ticks % MAX_SHIFT == 0)
    shown = show(notes, -early / TICKS_PER_SECOND, ticks - early, events)
    return tokenizer.without_special(tokenizer.from_events(shown)).astype(np.int64)


def between_moments(tables: TokenTables, moment: Moment) -> bool:
    """Whether a key has just been pressed or released, or nothing has happened yet."""
    g = tables.grammar
    acts = (g.press >= 0) | (g.release >= 0)
    return moment.state == g.start or moment.state in g.next_state[:, acts]
