"""`dsmr-mlx live`: play with a model in real time."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr_mlx.cli import steering_options
from dsmr_mlx.cli.common import add_checkpoint, add_command, load_checkpoint
from dsmr_mlx.cli.console import err, out, table
from dsmr_mlx.cli.models import show_licence
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.formatting import one_line
from dsmr_mlx.generation.options import parse_option

if TYPE_CHECKING:
    from dsmr_mlx.generation.player import Player
    from dsmr_mlx.live.options import LiveOptions
    from dsmr_mlx.live.ports import Endpoint
    from dsmr_mlx.live.session import Output, Session, Turn
    from dsmr_mlx.live.statistics import Statistics
    from dsmr_mlx.model.dsmr import DSMR
    from dsmr_mlx.tokenizers.base import Tokenizer

MAX_TURN_AFTER_FILE = 30.0  # seconds; a file never interrupts the model
SWITCH_SECONDS = 0.001  # how long one thread may delay another that has a note to send


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands,
        "live",
        run,
        "dsmr-mlx live --in Piano --out Piano --pause 0.8 --out-file session.mid",
        "dsmr-mlx live runs/first --in-file song.mid --offline --out-file answered.mid",
    )
    add_checkpoint(p)
    add_ports(p)
    add_turns(p)
    steering_options.add_sampling(p)
    p.add_argument("--seed", type=int, help="random seed (default 0)")
    p.add_argument("--from-state", metavar="FILE.safetensors", help="start from a saved state")
    p.add_argument("--save-state", metavar="FILE.safetensors", help="save the state of the model at the end")
    p.add_argument("--force", action="store_true", help="overwrite files")
    steering_options.add_steering(p, ends=False)


def add_ports(p: argparse.ArgumentParser) -> None:
    """Add the options of inputs and outputs."""
    ports = p.add_argument_group("ports", "where your notes come from and where the notes of the model go")
    ports.add_argument("--list", action="store_true", help="show the MIDI ports of this computer")
    ports.add_argument("--in", dest="in_port", metavar="PORT", help="a MIDI input, or part of its name")
    ports.add_argument("--out", dest="out_port", metavar="PORT", help="a MIDI output, or part of its name")
    ports.add_argument(
        "--virtual",
        nargs="?",
        const="dsmr-mlx",
        metavar="NAME",
        help="make a MIDI input and an output that other programs, such as a DAW, see under this name (dsmr-mlx)",
    )
    network = ports.add_mutually_exclusive_group()
    network.add_argument("--socket", metavar="HOST:PORT", help="MIDI over TCP, both ways: connect to a server")
    network.add_argument("--listen", metavar="HOST:PORT", help="MIDI over TCP, both ways: wait for a client")
    ports.add_argument(
        "--in-file",
        metavar="FILE.mid",
        help="play this file as input; the session ends with it if there is no other input",
    )
    ports.add_argument(
        "--offline", action="store_true", help="with --in-file: run in virtual time, as fast as the model computes"
    )
    ports.add_argument(
        "--out-file",
        metavar="FILE.mid",
        help="record the session: a track for you and one for the model",
    )


def add_turns(p: argparse.ArgumentParser) -> None:
    """Add the options of turns."""
    turns = p.add_argument_group("turns")
    turns.add_argument(
        "--take-over",
        default="pause",
        metavar="WHEN",
        help="what starts the turn of the model: a pause in your playing (pause, the default), the sustain pedal "
        "(pedal), another controller (controller:N) or the Enter key (enter); the last three also end its turn",
    )
    turns.add_argument(
        "--pause", type=float, default=1.0, metavar="X", help="length of that pause, without a key down (default 1)"
    )
    turns.add_argument(
        "--max-turn", type=float, metavar="X", help="the model ends its turn after X seconds (with --in-file 30)"
    )
    turns.add_argument("--thru", action="store_true", help="also send your notes to the output")
    turns.add_argument(
        "--channel",
        type=int,
        default=1,
        metavar="N",
        help="MIDI channel of the model, 1 to 16 (default 1); with --thru choose a channel other than your own, so "
        "that your pedal does not sustain the notes of the model",
    )
    turns.add_argument(
        "--latency",
        type=float,
        default=0.0,
        metavar="MS",
        help="send notes MS milliseconds early if the instrument is slow",
    )


def run(a: argparse.Namespace) -> None:
    """Play a session, or list the MIDI ports."""
    if a.list:
        from dsmr_mlx.live.ports import port_names

        show_ports(*port_names())
        return
    from dsmr_mlx.live.clock import RealClock, VirtualClock
    from dsmr_mlx.live.recorder import Recorder
    from dsmr_mlx.live.session import Session
    from dsmr_mlx.live.sources import EnterKey

    options = options_of(a)
    check_options(a)
    steering_options.fill_recommended(a)
    playing = steering_options.playing_options(a)
    model, tokenizer, checkpoint = load_checkpoint(a.checkpoint)
    with contextlib.ExitStack() as stack:
        player = make_player(a, model, tokenizer, playing)
        if a.listen:  # a client may play as soon as it is accepted
            player.warm_up()
        clock = VirtualClock() if a.offline else RealClock()
        sources, output = open_ports(a, stack)
        show_licence(checkpoint)
        recorder = Recorder(a.out_file) if a.out_file else None
        session = Session(player, clock, output, options, recorder, show_turn)
        stack.enter_context(fast_thread_switching())
        show_live(options, [source.name for source in sources if source.is_input], output.name if output else None)
        if options.take_over == "enter":
            sources.append(EnterKey())
        with session.handling_signals():  # until everything is saved and shown
            reason = play(session, sources, a.save_state)
            files = [*(recorder.paths if recorder else []), *([a.save_state] if a.save_state else [])]
            show_live_report(session.statistics, reason, files)


def play(session: "Session", sources: "Sequence[Endpoint]", save_state: str | None) -> str:
    """Run the session and return why it ended. The player's state is saved even after an error."""
    try:
        return session.run(sources)
    finally:
        if save_state and session.ready:
            try:
                session.settle()
            finally:
                session.player.save(save_state)


def options_of(a: argparse.Namespace) -> "LiveOptions":
    """Return the options of the session. Raises `UserError` for invalid values."""
    from dsmr_mlx.live.options import LiveOptions

    values = {name: getattr(a, name) for name in ("take_over", "pause", "max_turn", "thru", "channel")}
    values |= {"latency": a.latency / 1000}
    if a.max_turn is None and a.in_file:
        values["max_turn"] = MAX_TURN_AFTER_FILE
    for name, value in values.items():
        parse_option(name, getattr(a, name), lambda _, only={name: value}: LiveOptions(**only))
    return LiveOptions(**values)


def check_options(a: argparse.Namespace) -> None:
    """Raise `UserError` for invalid combinations of options, before anything that takes time."""
    from dsmr_mlx.cli.outputs import OUTPUT_SUFFIXES
    from dsmr_mlx.common.files import check_output

    both_ways = a.socket or a.listen or a.virtual
    others = "--virtual, --socket or --listen (--list shows the ports)"
    if not (a.in_port or a.in_file or both_ways):
        raise UserError(f"no input given: expected --in, --in-file, {others}")
    if not (a.out_port or a.out_file or both_ways):
        raise UserError(f"no output given: expected --out, --out-file, {others}")
    if a.offline and (not a.in_file or not a.out_file or a.in_port or a.out_port or both_ways):
        raise UserError("--offline: expected --in-file and --out-file with it, and no ports, which need real time")
    if a.offline and a.take_over == "enter":
        raise UserError("--take-over enter: not with --offline, which is not interactive")
    for option, path, suffixes in (
        ("--out-file", a.out_file, OUTPUT_SUFFIXES),
        ("--save-state", a.save_state, (".safetensors",)),
    ):
        if path:
            check_output(option, path, suffixes, a.force)
    if a.from_state is not None:
        steering_options.refuse_with_state(a, "seed")


def make_player(a: argparse.Namespace, model: "DSMR", tokenizer: "Tokenizer", playing: dict[str, Any]) -> "Player":
    """Return a new or a saved player of one lane.

    Raises `UserError` for a vocabulary without live support, and for a state with several lanes.
    """
    from dsmr_mlx.generation.player import Player
    from dsmr_mlx.live.vocabularies import live_ids

    live_ids(tokenizer)
    if a.from_state is None:
        return Player(model, tokenizer, **playing, seed=a.seed or 0)
    player = Player.load(a.from_state, model, tokenizer)
    if player.lanes != 1:
        raise UserError(f"--from-state {a.from_state}: has {player.lanes} lanes, expected 1")
    return player


def open_ports(a: argparse.Namespace, stack: contextlib.ExitStack) -> "tuple[list[Endpoint], Output | None]":
    """Return the sources to start, and the output, if any. The stack closes them."""
    from dsmr_mlx.live.network import Server, connect
    from dsmr_mlx.live.ports import DeviceInput, DeviceOutput, VirtualInput, VirtualOutput
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
    if a.virtual:
        virtual = VirtualInput(a.virtual), VirtualOutput(a.virtual)
        sources += virtual
        for port in virtual:
            stack.callback(port.close)
        output = output or virtual[1]
    if a.socket or a.listen:
        if a.socket:
            network = connect(a.socket)
        else:
            server = Server(a.listen)
            if not server.is_local:
                err.print(
                    f"warning: {server.host} accepts other computers: anyone who reaches it over the network can play "
                    "and listen, without password or encryption; use --listen 127.0.0.1:PORT for this computer alone"
                )
            err.print(f"waiting for a client on {server.host}:{server.port}")
            network = server.accept()
        sources.append(network)
        stack.callback(network.close)
        output = output or network
    return sources, output


@contextlib.contextmanager
def fast_thread_switching() -> Iterator[None]:
    """Make Python switch threads more often, so that a note to send is not delayed."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def show_ports(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Show the MIDI ports of this computer."""
    for kind, names in (("input", inputs), ("output", outputs)):
        for name in names:
            out.print(f"{kind:<7} {name}")
        if not names:
            out.print(f"{kind:<7} none")


def print_line(text: str) -> None:
    """Print a line. Errors of a closed terminal are ignored, so that the music goes on."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=err.file, flush=True)  # without Rich, which would exit


def show_live(options: "LiveOptions", sources: Sequence[str], output: str | None) -> None:
    """Show the inputs, the output and what starts the turn of the model."""
    when = {"pause": f"{options.pause:g} s after your last key", "pedal": "at the pedal", "enter": "at Enter"}
    take_over = when.get(options.take_over, f"at {options.take_over}")
    ports = f"from {', '.join(sources)} to {output or 'the file'}"
    print_line(f"{ports}; the model takes over {take_over}; Ctrl-C ends the session")


def show_turn(turn: "Turn") -> None:
    """Show a turn that has ended."""
    who = {"human": "you", "model": "model"}[turn.voice]
    slow = f"; too slow, fell behind {'once' if turn.behind == 1 else f'{turn.behind} times'}" if turn.behind else ""
    print_line(f"{who:<6} {turn.notes:>4} notes {turn.seconds:>6.1f} s  {turn.reason}{slow}")


def show_live_report(statistics: "Statistics", reason: str, files: Sequence[str | Path]) -> None:
    """Show why the session ended, its timing and its files."""
    s = statistics
    times = table("milliseconds", "n", "median", "95 %", "largest")
    for name, measured in (
        ("take-over to first note, computing", s.first_computed),
        ("take-over to first note, sent", s.first_sent),
        ("lateness of notes", s.lateness),
        ("reading, per token", s.reading),
    ):
        n, *seconds = measured.spread
        times.add_row(name, f"{n:,}", *(f"{1000 * value:.1f}" if n else "–" for value in seconds))
    out.print(reason)
    out.print(times)
    out.print(
        f"{s.played:,} events played, {s.tokens_per_second:,.0f} per second of computing; {s.rewound:,} undone; "
        f"{s.dropped:,} notes too late to be played; fell behind {s.behind:,} times"
    )
    if s.unread:
        out.print(f"{s.unread:,} of your notes not read by the model: too many at once")
    for path in files:
        out.print(str(path))
