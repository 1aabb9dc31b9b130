"""`dsmr-mlx studio`: make music in a page in the browser."""

import argparse
import threading
import traceback
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command
from dsmr_mlx.cli.console import err, out
from dsmr_mlx.cli.live import fast_thread_switching
from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.signals import handled
from dsmr_mlx.model.bundled import DEFAULT

if TYPE_CHECKING:
    import socket

    from dsmr_mlx.studio.server import Hub, Server
    from dsmr_mlx.studio.studio import Studio

PORT = 8642  # or any free one, if it is taken and none is given
LOCALHOST = "127.0.0.1"
LOCAL = (LOCALHOST, "localhost", "::1")
INSTALL = "pip install 'dsmr-mlx[studio]'"


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(
        commands, "studio", run, "dsmr-mlx studio", 'dsmr-mlx studio "Evening" --model runs/first --folder music'
    )
    p.add_argument(
        "session",
        nargs="?",
        metavar="SESSION",
        help="the name of a session in the folder, or a file NAME.studio; made if it does not exist (default: the one "
        "changed last)",
    )
    p.add_argument(
        "--model",
        action="append",
        metavar="CHECKPOINT",
        help=f"a checkpoint or run to play with; may be repeated; the first is the default (else {DEFAULT}). "
        "Bundled models and those in the current folder can be chosen in the page",
    )
    p.add_argument(
        "--folder",
        metavar="DIR",
        help="where sessions are kept (default ~/Music/dsmr-mlx on macOS, else ~/.local/share/dsmr-mlx)",
    )
    p.add_argument("--port", type=int, metavar="N", help=f"port (default {PORT}, or a free one)")
    p.add_argument("--no-browser", action="store_true", help="only print the address")
    p.add_argument("--host", default=LOCALHOST, metavar="ADDRESS", help="address to listen on (default 127.0.0.1)")
    p.add_argument(
        "--allow-network",
        action="store_true",
        help="with --host: let other computers connect; whoever knows the address with its token can play, listen, "
        "read and change sessions, and nothing is encrypted",
    )


def run(a: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or another signal."""
    check_options(a)
    try:
        from dsmr_mlx.studio import server  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "websockets"):
            raise
        raise UserError(f"the studio needs {error.name}, install it with {INSTALL}") from None
    listening = listen(a)
    with listening:
        application = make_server(a, listening)
        if a.allow_network:
            err.print(
                "warning: other computers can connect; whoever has the address with its token can play, listen, read "
                "and change sessions, and nothing is encrypted"
            )
        serve(a, application, listening)


def serve(a: argparse.Namespace, application: "Server", listening: "socket.socket") -> None:
    """Serve until a signal comes. It does not interrupt code: at the end everything is saved and all keys are up."""
    from dsmr_mlx.studio import server

    program = server.make_program(application, lambda: show_address(a, application))

    def end(number: int, frame: object) -> None:
        program.force_exit = program.should_exit  # a second one does not wait for connections
        program.should_exit = True

    with handled(end), fast_thread_switching():
        program.run(sockets=[listening])


def check_options(a: argparse.Namespace) -> None:
    """Raise `UserError` for invalid options, before anything is loaded."""
    if a.port is not None and not 0 <= a.port < 1 << 16:
        raise UserError(f"--port {a.port}: expected 0 to 65535")
    if a.host not in LOCAL and not a.allow_network:
        raise UserError(
            f"--host {a.host}: other computers could connect; expected --allow-network with it, which lets whoever "
            "knows the address with its token play, listen, read and change sessions"
        )


def listen(a: argparse.Namespace) -> "socket.socket":
    """Return a socket that listens, on a free port if none is given and the usual one is taken."""
    from dsmr_mlx.studio.server import listen

    if a.port is not None:
        return listen(a.host, a.port)
    try:
        return listen(a.host, PORT)
    except UserError:
        return listen(a.host, 0)


def make_server(a: argparse.Namespace, listening: "socket.socket") -> "Server":
    """Return the application, with the session open."""
    from dsmr_mlx.studio.folder import default_folder
    from dsmr_mlx.studio.models import Models
    from dsmr_mlx.studio.security import Guard, kept_token
    from dsmr_mlx.studio.server import Server

    home = default_folder() if a.folder is None else Path(a.folder).expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {home}: cannot be made ({error.strerror or error})") from None
    models = Models(a.model or ())
    guard = Guard(kept_token(home), a.host, listening.getsockname()[1], network=a.allow_network)
    return Server(guard, lambda hub: open_studio(a, home, models, hub))


def open_studio(a: argparse.Namespace, home: Path, models, hub: "Hub") -> "Studio":
    """Open the session that was named, else the one changed last that is not in use, else a new one."""
    from dsmr_mlx.studio.folder import chosen_path, free_path, sessions_in
    from dsmr_mlx.studio.studio import Studio

    def make(path: Path) -> Studio:
        return Studio(path, home, models, hub.publish, show_unexpected)

    if a.session is not None:
        return make(chosen_path(a.session, home))
    others = sessions_in(home)
    for path in others:
        try:
            return make(path)
        except UserError as error:  # in use or damaged
            err.print(f"not opened: {error}")
    path = free_path(home)
    if others:
        err.print(f"a new session: {path}")
    return make(path)


def show_unexpected(error: BaseException) -> None:
    """Print an unexpected error; the program goes on."""
    err.print(f"error: {''.join(traceback.format_exception(error))}")


def show_address(a: argparse.Namespace, application: "Server") -> None:
    """Print the address, and open it in a browser."""
    out.print(application.guard.address)
    out.file.flush()
    if not a.no_browser:
        threading.Thread(target=webbrowser.open, args=(application.guard.address,), daemon=True).start()
