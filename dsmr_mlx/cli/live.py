"""`dsmr-mlx live`: a model that listens and answers."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli.common import add_checkpoint, add_command, load_checkpoint
from dsmr_mlx.cli.console import err
from dsmr_mlx.cli.models import show_licence
from dsmr_mlx.cli.steering_options import (
    add_sampling,
    add_steering,
    processors_of,
    recommend,
    refuse_beside_state,
    sampling_of,
)
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.generation.options import parse_option

if TYPE_CHECKING:
    from dsmr_mlx.generation.player import Player
    from dsmr_mlx.live.clock import Clock
    from dsmr_mlx.live.options import LiveOptions
    from dsmr_mlx.live.session import Session
import contextlib
from collections.abc import Sequence

from dsmr_mlx.cli.console import out, table

ANSWER_SECONDS = 30.0  # of an answer to a file, which will not interrupt it
SWITCH_SECONDS = 0.001  # how long a thread may keep others waiting that have a note to send


def add(commands) -> None:
    p = add_command(
        commands,
        "live",
        run,
        "dsmr-mlx live --in Piano --out Piano --pause 0.8 --out-file session.mid\n"
        "  dsmr-mlx live runs/first --in-file song.mid --offline --out-file answered.mid",
    )
    add_checkpoint(p)
    add_ports(p)
    add_turns(p)
    add_sampling(p)
    p.add_argument("--seed", type=int, help="of what is drawn (default 0)")
    p.add_argument("--from-state", metavar="FILE.safetensors", help="go on with a model that remembers this")
    p.add_argument("--save-state", metavar="FILE.safetensors", help="keep what it remembers in the end")
    p.add_argument("--force", action="store_true", help="overwrite files")
    add_steering(p, ends=False)


def add_ports(p: argparse.ArgumentParser) -> None:
    ports = p.add_argument_group("ports", "where your music comes from, and the model's goes to")
    ports.add_argument("--list", action="store_true", help="show the MIDI ports of this computer")
    ports.add_argument("--in", dest="in_port", metavar="PORT", help="a MIDI input, or a part of its name")
    ports.add_argument("--out", dest="out_port", metavar="PORT", help="a MIDI output, or a part of its name")
    network = ports.add_mutually_exclusive_group()
    network.add_argument("--socket", metavar="HOST:PORT", help="MIDI over TCP, both ways: connect to a server")
    network.add_argument("--listen", metavar="HOST:PORT", help="MIDI over TCP, both ways: wait for a client")
    ports.add_argument(
        "--in-file", metavar="FILE.mid", help="a file that plays as a person would; alone, the session ends with it"
    )
    ports.add_argument(
        "--offline", action="store_true", help="with --in-file: in virtual time, as fast as the model computes"
    )
    ports.add_argument(
        "--out-file", metavar="FILE.mid", help="keep all that sounded, a track for you and one for the model; it grows"
    )


def add_turns(p: argparse.ArgumentParser) -> None:
    turns = p.add_argument_group("turns")
    turns.add_argument(
        "--take-over",
        default="pause",
        metavar="WHEN",
        help="the model plays after a pause of yours (the default), at the sustain pedal: pedal, at another one: "
        "controller:N, or at the Enter key: enter; the last three also end its turn",
    )
    turns.add_argument("--pause", type=float, default=1.0, metavar="X", help="seconds with no key down (default 1)")
    turns.add_argument(
        "--max-turn", type=float, metavar="X", help="the model ends its turn after X seconds (with --in-file 30)"
    )
    turns.add_argument("--thru", action="store_true", help="send on what you play, too")
    turns.add_argument(
        "--channel",
        type=int,
        default=1,
        metavar="N",
        help="of the model's notes, 1 to 16 (default 1); with --thru one that is not yours keeps your pedal off them",
    )
    turns.add_argument(
        "--latency", type=float, default=0.0, metavar="MS", help="send notes so much earlier, for a slow instrument"
    )


def run(a: argparse.Namespace) -> None:
    from dsmr_mlx.live.recorder import Recorder

    if a.list:
        from dsmr_mlx.live.ports import port_names

        show_ports(*port_names())
        return
    options = options_of(a)
    check_options(a)
    recommend(a)
    sampling, processors = sampling_of(a), processors_of(a, None)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    with ExitStack() as stack:
        player = make_player(a, model, tokenizer, sampling, processors)
        clock = make_clock(a)
        sources, output = open_ports(a, stack)
        show_licence(checkpoint)
        recorder = Recorder(a.out_file) if a.out_file else None
        session = make_session(player, clock, output, options, recorder)
        stack.enter_context(quick_threads())
        show_live(options, [source.name for source in sources], output.name if output else None)
        if options.take_over == "enter":
            sources.append(enter_key())
        with session.handling_signals():  # until all is kept and told
            reason = play(session, sources, a.save_state)
            files = [*(recorder.paths if recorder else []), *([a.save_state] if a.save_state else [])]
            show_live_report(session.statistics, reason, files)


def play(session: "Session", sources: list[Any], save_state: str | None) -> str:
    """Why the session ended; however it did, the player's state is kept, if it has come to play."""
    try:
        return session.run(sources)
    finally:
        if save_state and session.ready:
            try:
                session.settle()
            finally:
                session.player.save(save_state)


def options_of(a: argparse.Namespace) -> "LiveOptions":
    """How the session goes. Raises `UserError` that names the option."""
    from dsmr_mlx.live.options import LiveOptions

    values = {name: getattr(a, name) for name in ("take_over", "pause", "max_turn", "thru", "channel")}
    values |= {"latency": a.latency / 1000}
    if a.max_turn is None and a.in_file:
        values["max_turn"] = ANSWER_SECONDS
    for name, value in values.items():
        parse_option(name, getattr(a, name), lambda _, only={name: value}: LiveOptions(**only))
    return LiveOptions(**values)


def check_options(a: argparse.Namespace) -> None:
    """Raise `UserError` for options that exclude or need each other, before anything that takes time."""
    from dsmr_mlx.cli.outputs import MIDI_SUFFIXES
    from dsmr_mlx.common.files import check_output

    network = a.socket or a.listen
    if not (a.in_port or a.in_file or network):
        raise UserError("nobody plays: expected --in, --in-file, --socket or --listen (--list shows the ports)")
    if not (a.out_port or a.out_file or network):
        raise UserError("nobody hears: expected --out, --out-file, --socket or --listen (--list shows the ports)")
    if a.offline and (not a.in_file or not a.out_file or a.in_port or a.out_port or network):
        raise UserError("--offline: expected --in-file and --out-file with it, and no port: those are in real time")
    if a.offline and a.take_over == "enter":
        raise UserError("--take-over enter: not with --offline, where nobody waits")
    for option, path, suffixes in (
        ("--out-file", a.out_file, MIDI_SUFFIXES),
        ("--save-state", a.save_state, (".safetensors",)),
    ):
        if path:
            check_output(option, path, suffixes, a.force)
    if a.from_state is not None:
        refuse_beside_state(a, "seed")


def make_player(a: argparse.Namespace, model, tokenizer, sampling, processors) -> "Player":
    """One lane, new or saved. Raises `UserError` for a vocabulary that cannot be played live, or several lanes."""
    from dsmr_mlx.generation.player import Player
    from dsmr_mlx.live.transcript import EventIds

    EventIds(tokenizer)
    if a.from_state is None:
        return Player(model, tokenizer, sampling=sampling, processors=processors, seed=a.seed or 0)
    player = Player.load(a.from_state, model, tokenizer)
    if player.lanes != 1:
        raise UserError(f"--from-state {a.from_state}: has {player.lanes} lanes, expected 1")
    return player


def make_clock(a: argparse.Namespace) -> "Clock":
    from dsmr_mlx.live.clock import RealClock, VirtualClock

    return VirtualClock() if a.offline else RealClock()


def open_ports(a: argparse.Namespace, stack: ExitStack) -> tuple[list[Any], Any]:
    """All that is to be started, and the output, None if there is none; the stack closes them."""
    from dsmr_mlx.live.network import Server, connect
    from dsmr_mlx.live.ports import DeviceInput, DeviceOutput
    from dsmr_mlx.live.sources import FilePlayer, read_messages

    sources = []
    if a.in_file:
        sources.append(FilePlayer(read_messages(a.in_file), a.in_file))
    if a.in_port:
        sources.append(DeviceInput(a.in_port))
        stack.callback(sources[-1].close)
    output = None
    if a.out_port:
        sources.append(output := DeviceOutput(a.out_port))
        stack.callback(output.close)
    if a.socket or a.listen:
        if a.socket:
            network = connect(a.socket)
        else:
            server = Server(a.listen)
            err.print(f"waiting for a client on {server.host}:{server.port}")
            network = server.accept()
        sources.append(network)
        stack.callback(network.close)
        output = output or network
    return sources, output


def make_session(player: "Player", clock: "Clock", output, options, recorder) -> "Session":
    from dsmr_mlx.live.session import Session

    return Session(player, clock, output, options, recorder, show_turn)


def enter_key() -> Any:
    from dsmr_mlx.live.sources import EnterKey

    return EnterKey()


@contextmanager
def quick_threads() -> Iterator[None]:
    """Let a thread that has a note to send have its turn sooner."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def show_ports(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """The MIDI ports of this computer."""
    for kind, names in (("input", inputs), ("output", outputs)):
        for name in names:
            out.print(f"{kind:<7} {name}")
        if not names:
            out.print(f"{kind:<7} none")


def say(text: str) -> None:
    """Print, if anybody is there to read it: no music ends because a terminal is gone."""
    with contextlib.suppress(OSError):
        print(text, file=err.file, flush=True)  # rich would exit


def show_live(options: Any, sources: Sequence[str], output: str | None) -> None:
    """Who plays with whom, when a session begins."""
    when = {"pause": f"{options.pause:g} s after your last key", "pedal": "at the pedal", "enter": "at Enter"}
    take_over = when.get(options.take_over, f"at {options.take_over}")
    ports = f"from {', '.join(sources)} to {output or 'the file'}"
    say(f"{ports}; the model takes over {take_over}; Ctrl-C ends the session")


def show_turn(turn: Any) -> None:
    """A turn of a session that has ended."""
    who = {"human": "you", "model": "model"}[turn.voice]
    slow = f"; too slow, fell behind {'once' if turn.behind == 1 else f'{turn.behind} times'}" if turn.behind else ""
    say(f"{who:<6} {turn.notes:>4} notes {turn.seconds:>6.1f} s  {turn.reason}{slow}")


def show_live_report(statistics: Any, reason: str, files: Sequence[Any]) -> None:
    """What a session took."""
    s = statistics
    times = table("milliseconds", "n", "median", "95 %", "largest")
    for name, measured in (
        ("take-over to first note, computing", s.first_computed),
        ("take-over to first note, sent", s.first_sent),
        ("notes behind their time", s.lateness),
        ("reading, for each token", s.reading),
    ):
        of = measured.spread
        shown = (f"{1000 * value:.1f}" if of.n else "–" for value in of[1:])
        times.add_row(name, f"{of.n:,}", *shown)
    out.print(reason)
    out.print(times)
    out.print(
        f"{s.played:,} events played, {s.tokens_per_second:,.0f} a second of computing; {s.rewound:,} taken back; "
        f"{s.dropped:,} notes too late to be played; fell behind {s.behind:,} times"
    )
    for path in files:
        out.print(str(path))
