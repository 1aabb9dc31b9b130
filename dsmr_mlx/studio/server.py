"""The web application: the page, its files, exports, and the socket of messages."""

import asyncio
import errno
import json
import os
import re
import socket as sockets
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.resources import files
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from dsmr_mlx.common.errors import UserError
from dsmr_mlx.common.html import SCHEMES
from dsmr_mlx.studio import exports
from dsmr_mlx.studio.folder import new_path
from dsmr_mlx.studio.messages import MAX_BYTES, InvalidMessage, Message, parse
from dsmr_mlx.studio.security import Guard
from dsmr_mlx.studio.store import Store, put_in_place
from dsmr_mlx.studio.studio import ENDS, QUICK, SLOW, Studio, plain
from dsmr_mlx.studio.work import described

MAX_CLIENTS = 16
MAX_WAITING = 2000  # messages that a client has not read
MAX_REQUESTS = 16  # messages of a client that wait to be handled; then no more are read
RATE, BURST = 200.0, 400.0  # messages a second of one client, and how many may come at once
MAX_INVALID = 100  # messages of one client in a row
MAX_SESSION_BYTES = 256 << 20  # of a session that is uploaded
STATUS_SECONDS = 1.0
LOOK_TICKS = 2  # of the status, between two looks at the devices
SHUTDOWN_SECONDS = 2  # for connections to end
CLOSED_SLOW, CLOSED_RATE, CLOSED_FULL = 1013, 1008, 1013  # codes of RFC 6455
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
    ".woff2": "font/woff2",
}
PAGE, SHARED = files("dsmr_mlx.studio") / "page", files("dsmr_mlx.music") / "page"
TAKE_ID = re.compile(r"[0-9]{1,16}")
COLOURS = "colours.css"  # made of `common.html.SCHEMES`


class Connection:
    """A client: messages wait in a queue until they are sent, requests in another until they are handled.

    unfinished: the number of requests that wait or are being handled
    """

    def __init__(self, hub: "Hub"):
        self.hub = hub
        self.waiting: deque[str] = deque()
        self.more = asyncio.Event()
        self.slow = False
        self.requests: asyncio.Queue[Message] = asyncio.Queue(MAX_REQUESTS)
        self.unfinished = 0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. Thread-safe, does not block."""
        self.hub.deliver(encode(message), only=self)

    def take(self, text: str) -> None:
        """Put a message into the queue, in the loop's thread; a client that reads too slowly is given up."""
        if len(self.waiting) >= MAX_WAITING:
            self.slow = True
        else:
            self.waiting.append(text)
        self.more.set()


class Hub:
    """All clients. Messages may come from any thread; all clients get them in the same order."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.loop: asyncio.AbstractEventLoop | None = None

    def publish(self, message: dict[str, Any], but: Connection | None = None) -> None:
        """Send a message to all clients, except one. Thread-safe, does not block."""
        self.deliver(encode(message), but=but)

    def deliver(self, text: str, only: Connection | None = None, but: Connection | None = None) -> None:
        """Send a text to one client, or to all except one."""

        def put() -> None:
            for connection in [only] if only is not None else list(self.connections):
                if connection is not but:
                    connection.take(text)

        if self.loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(put)


def encode(message: dict[str, Any]) -> str:
    """A message as JSON, which has neither NaN nor infinity."""
    return json.dumps(message, allow_nan=False, separators=(",", ":"))


class Limiter:
    """A token bucket: `RATE` messages a second, `BURST` at once."""

    def __init__(self, now: float):
        self.left, self.last = BURST, now

    def allows(self, now: float) -> bool:
        """Count a message. Return whether it is within the rate."""
        self.left = min(self.left + (now - self.last) * RATE, BURST)
        self.last = now
        self.left -= 1
        return self.left >= 0


class Guarded:
    """An application behind a guard: everything else is answered with 403."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        allowed = self.guard.allows(scope["headers"], scope["query_string"])
        if scope["type"] == "websocket":
            if allowed:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": CLOSED_RATE})  # before it is accepted: 403
            return
        fresh = allowed and self.guard.has_token(scope["query_string"])

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [*self.guard.headers, *([("set-cookie", self.guard.set_cookie)] if fresh else [])]
                message["headers"] = [*message["headers"], *((n.encode(), v.encode()) for n, v in extra)]
            await send(message)

        app = self.app if allowed else PlainTextResponse("403: open the address that the program has printed\n", 403)
        await app(scope, receive, send_guarded)


class Server:
    """The application of a studio."""

    def __init__(self, guard: Guard, make_studio: Callable[[Hub], Studio]):
        self.guard, self.hub = guard, Hub()
        self.studio = make_studio(self.hub)
        self._handling: asyncio.Lock | None = None  # one message at a time changes the studio
        self.app = Guarded(
            Starlette(
                routes=[
                    Route("/", self.index),
                    Route("/page/{name}", self.page_file),
                    Route("/shared/{name}", self.shared_file),
                    Route("/export/{name}", self.export),
                    Route("/session", self.download, methods=["GET"]),
                    Route("/session", self.upload, methods=["POST"]),
                    WebSocketRoute("/socket", self.socket),
                ],
                lifespan=self.lifespan,
            ),
            guard,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Begin with the loop; at the end complete and save everything."""
        self.hub.loop, self._handling = asyncio.get_running_loop(), asyncio.Lock()
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            with suppress(asyncio.CancelledError):
                await ticking
            await run_in_threadpool(self.studio.close)
            self.hub.loop = None

    async def _tick(self) -> None:
        """Repeat the status while something is being done, else complete the file; look what is plugged in."""
        for tick in count():
            await asyncio.sleep(STATUS_SECONDS)
            if tick % LOOK_TICKS == 0:
                self.studio.devices.look()
            if (status := self.studio.status).activity != "idle":
                self.hub.publish(status.message())
            else:
                with suppress(UserError):  # the client that changed something got the error; the next tick tries again
                    await run_in_threadpool(self.studio.session.flush)

    # Files

    async def index(self, request: Request) -> Response:
        """The page."""
        return static(PAGE, "index.html")

    async def page_file(self, request: Request) -> Response:
        """A file of the page."""
        return static(PAGE, request.path_params["name"])

    async def shared_file(self, request: Request) -> Response:
        """A file that the page shares with the page of `show --html`."""
        if request.path_params["name"] == COLOURS:
            return Response(SCHEMES, media_type=TYPES[".css"])
        return static(SHARED, request.path_params["name"])

    async def export(self, request: Request) -> Response:
        """The music of a take as a file."""
        number, _, kind = request.path_params["name"].partition(".")
        if kind not in exports.TYPES:
            return PlainTextResponse(f"{kind}: expected one of {', '.join(exports.TYPES)}\n", 404)
        if not TAKE_ID.fullmatch(number):
            return PlainTextResponse("404: no such take\n", 404)
        session = self.studio.session
        try:
            take = session.get(int(number))
            notes = session.music(take.id)
        except UserError as error:
            return PlainTextResponse(f"{plain(str(error))}\n", 404)
        try:
            made_by = json.dumps({"program": "dsmr-mlx studio", "session": session.name, "take": take.id})
            data = await run_in_threadpool(exports.export, notes, kind, take.name, made_by)
        except (UserError, OSError) as error:
            return refusal(error)
        return Response(data, headers=attachment(f"{take.name}.{kind}"), media_type=exports.TYPES[kind])

    async def download(self, request: Request) -> Response:
        """The session as one file, without recurrent states, which are large and can be computed again."""
        session = self.studio.session

        def read() -> bytes:
            with TemporaryDirectory(prefix="dsmr-mlx-") as folder:
                path = Path(folder) / "session"
                session.copy_to(path, states=False)
                return path.read_bytes()

        try:
            data = await run_in_threadpool(read)
        except (UserError, OSError) as error:
            return refusal(error)
        headers = attachment(session.path.name)
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def upload(self, request: Request) -> Response:
        """Put a session into the folder."""
        try:
            path = new_path(self.studio.home, request.query_params.get("name", ""))
            data = await body(request, MAX_SESSION_BYTES)
            await run_in_threadpool(keep_session, path, data)
        except (UserError, OSError) as error:
            return refusal(error)
        except ClientDisconnect:
            return PlainTextResponse("", 400)
        return JSONResponse({"name": path.stem})

    # Messages

    async def socket(self, websocket: WebSocket) -> None:
        """Talk to one client until it leaves."""
        await websocket.accept()
        if len(self.hub.connections) >= MAX_CLIENTS:
            await websocket.close(CLOSED_FULL, "too many clients")
            return
        connection = Connection(self.hub)
        self.studio.devices.look(retry=True)
        async with self._handling:
            connection.take(encode(self.studio.welcome()))
            connection.take(encode(self.studio.playing()))
            self.hub.connections.add(connection)
        tasks = [
            asyncio.create_task(send_waiting(websocket, connection)),
            asyncio.create_task(self._handle_requests(connection)),
        ]
        try:
            try:
                await self._receive(websocket, connection)
            finally:
                self.studio.leave(connection)
            await connection.requests.join()
        finally:
            self.hub.connections.discard(connection)
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                    await task

    async def _receive(self, websocket: WebSocket, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        limiter, invalid = Limiter(loop.time()), 0
        while True:
            received = await websocket.receive()
            if received["type"] == "websocket.disconnect":
                return
            if not limiter.allows(loop.time()):
                await websocket.close(CLOSED_RATE, "too many messages")
                return
            content = received.get("text")
            content = received.get("bytes") or b"" if content is None else content
            try:
                message = parse(content)
            except InvalidMessage as error:
                invalid += 1
                connection.send({"type": "error", "message": plain(str(error)), "request": error.request})
                if invalid >= MAX_INVALID:
                    await websocket.close(CLOSED_RATE, "too many invalid messages")
                    return
                continue
            invalid = 0
            await self._take(connection, message)

    async def _take(self, connection: Connection, message: Message) -> None:
        """Handle a message of `QUICK`; put others, and `ENDS` once more, behind those that came before."""
        if message.type in QUICK:
            await self._handle(connection, message)
            if message.type not in ENDS or not connection.unfinished:
                return
            message = Message(message.type, message.fields)
        connection.unfinished += 1
        await connection.requests.put(message)
        await asyncio.sleep(0)  # so that a key that comes after `listen` is recorded

    async def _handle_requests(self, connection: Connection) -> None:
        """Handle what waits, in order, for ever."""
        while True:
            message = await connection.requests.get()
            await self._handle(connection, message)
            connection.unfinished -= 1
            connection.requests.task_done()

    async def _handle(self, connection: Connection, message: Message) -> None:
        try:
            if message.type in QUICK:
                self.studio.handle(connection, message)
                return
            async with self._handling:
                if message.type in SLOW:
                    await run_in_threadpool(self.studio.handle, connection, message)
                else:
                    self.studio.handle(connection, message)
        except UserError as error:
            connection.send({"type": "error", "message": plain(str(error)), "request": message.request})
        except Exception as error:  # the client must be told, and the socket stay open
            self.studio.unexpected(error)
            connection.send({"type": "error", "message": described(error), "request": message.request})


async def send_waiting(websocket: WebSocket, connection: Connection) -> None:
    """Send what waits for a client, for ever."""
    while True:
        await connection.more.wait()
        connection.more.clear()
        while connection.waiting and not connection.slow:
            await websocket.send_text(connection.waiting.popleft())
        if connection.slow:
            await websocket.close(CLOSED_SLOW, "read too slowly")
            return


def static(folder: Any, name: str) -> Response:
    """A file of a folder of the package; only names that are in it, and only of known types."""
    suffix = Path(name).suffix
    if suffix in TYPES and name in {each.name for each in folder.iterdir() if each.is_file()}:
        return Response((folder / name).read_bytes(), media_type=TYPES[suffix])
    return PlainTextResponse("404: no such file\n", 404)


def attachment(name: str) -> dict[str, str]:
    """The header that gives a download its name."""
    return {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='', errors='replace')}"}


async def body(request: Request, most: int) -> bytes:
    """The content of a request. Raises `UserError` if it has more than `most` bytes."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise UserError(f"a session of more than {most >> 20} MiB")
    return bytes(data)


def refusal(error: UserError | OSError) -> Response:
    """The answer if a file cannot be made or kept."""
    text = f"cannot be written ({error.strerror or error})" if isinstance(error, OSError) else str(error)
    return PlainTextResponse(f"{plain(text)}\n", 409)


def keep_session(path: Path, data: bytes) -> None:
    """Write an uploaded session into the folder. Raises `UserError` unless it is an undamaged session of a new name."""
    with TemporaryDirectory(prefix=".dsmr-mlx-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(data)
        try:
            store = Store(partial)
            try:
                store.load()
            finally:
                store.close()
        except UserError as error:
            raise UserError(str(error).replace(str(partial), path.stem)) from None
        put_in_place(partial, path)


class StudioServer(uvicorn.Server):
    """Uvicorn without its own signal handlers; on_ready() is called once it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self.on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the caller."""
        yield

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        if self.started:
            self.on_ready()


def listen(host: str, port: int) -> sockets.socket:
    """Return a socket that listens. Raises `UserError` if it cannot."""
    try:
        family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
        listening = sockets.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = os.strerror(error.errno) if getattr(error, "errno", 0) in errno.errorcode else str(error)
        raise UserError(f"`port` {port}: cannot listen on {host} ({reason})") from None
    # Connections inherit it. Without it a second message waits for the acknowledgement of the first, 40 ms.
    listening.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
    return listening


def make_program(server: Server, on_ready: Callable[[], None]) -> StudioServer:
    """Return the program that serves until its `should_exit` is set. Everything is saved when it ends."""
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=MAX_BYTES,
        limit_concurrency=4 * MAX_CLIENTS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        lifespan="on",
    )
    return StudioServer(config, on_ready)
