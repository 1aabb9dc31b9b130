"""The vocabularies of live sessions: those of key presses and releases, and Aria's, which writes notes."""

from dsmr_mlx.generation.player import Player
from dsmr_mlx.live.key_reply import KeyReply
from dsmr_mlx.live.note_reply import NoteReply
from dsmr_mlx.live.note_transcript import NoteIds, NoteTranscript
from dsmr_mlx.live.reply import Reply
from dsmr_mlx.live.transcript import EventIds, Transcript
from dsmr_mlx.tokenizers.aria.tokenizer import AriaTokenizer
from dsmr_mlx.tokenizers.base import Tokenizer


def live_ids(tokenizer: Tokenizer) -> EventIds | NoteIds:
    """Return the ids of a vocabulary. Raises `UserError` for one without live support."""
    return NoteIds(tokenizer) if isinstance(tokenizer, AriaTokenizer) else EventIds(tokenizer)


def transcript_of(event_ids: EventIds | NoteIds, player: Player, now: float) -> Transcript | NoteTranscript:
    """Return the transcript of a player that may have played. An incomplete note of its last music is rewound."""
    if isinstance(event_ids, NoteIds):
        while event_ids.grammar.allowed[state := player.moments[0].state].any() and not event_ids.may_begin[state]:
            player.rewind(1)
        return NoteTranscript(event_ids, player.moments[0], now)
    (moment,) = player.moments
    return Transcript(event_ids, moment.state, moment.velocity, player.held[0], now)


def reply_of(transcript: Transcript | NoteTranscript) -> type[Reply]:
    """Return the class of the replies to a transcript."""
    return NoteReply if isinstance(transcript, NoteTranscript) else KeyReply
