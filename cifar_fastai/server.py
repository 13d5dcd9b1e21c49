"""uvicorn's server, with what it lacks: connections that end when nothing comes, and an end in time."""

import logging
import os
import socket
import threading
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cifar_fastai.errors import UserError

MAX_HEAD_BYTES = 16_384  # of a request's lines before its body
HEAD_SECONDS = 10  # for all of them, from the first moment of a connection or the last answer on
UNREAD_SECONDS = 20  # for which an answer may wait without being read
MAX_CONNECTIONS = 1000  # at the same time; then those that have waited longest make room
MIN_CHUNK_BYTES, FREE_CHUNKS = 100, 1000  # on average, where a body comes in more pieces than that
STOP_SECONDS = 7  # from the first signal on, whatever is under way
CLOSING_SECONDS = 3  # of these for the answers that are being given
MAX_DESCRIPTORS = 65_536  # of files and connections, where the system lets us


class _Reader(h11.Connection):
    """Refuses a body that comes in crumbs: each takes as long as a piece of thousands of bytes."""

    n_pieces = n_bytes = 0

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.n_pieces = self.n_bytes = 0
        elif isinstance(event, h11.Data):
            self.n_pieces += 1
            self.n_bytes += len(event.data)
            if self.n_pieces > FREE_CHUNKS and self.n_bytes < self.n_pieces * MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("The body comes in pieces that are too small.")
        return event


class Connection(H11Protocol):
    """One that ends when its client sends no request, does not read, or has to make room for others."""

    most = MAX_CONNECTIONS

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.conn = _Reader(h11.SERVER, MAX_HEAD_BYTES)
        self.since = self.loop.time()  # when it opened, or the last answer was complete
        self.unread_since: float | None = None

    @property
    def stage(self) -> int:
        """0 before a request's lines are complete, 1 before its body is, 2 while a page or stream is answered, 3 a call."""
        if self.cycle is None or self.cycle.response_complete:
            return 0
        if self.cycle.more_body:
            return 1
        return 2 if self.scope["method"] == "GET" else 3

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > self.most:
            others = [each for each in self.connections if each is not self and each.stage < 3]
            others.sort(key=lambda each: (each.stage, each.since))
            for each in others[: self.most // 20] or [self]:  # some more, since it takes a while to find them
                each.transport.abort()

    def end_if_overdue(self) -> None:
        now = self.loop.time()
        idle = self.stage == 0 and now - self.since > HEAD_SECONDS
        if idle or (self.unread_since is not None and now - self.unread_since > UNREAD_SECONDS):
            self.transport.abort()

    def on_response_complete(self):
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self):
        self.unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self):
        self.unread_since = None
        super().resume_writing()

    def send_400_response(self, msg):
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # there is an answer already, or half of one
            self.transport.abort()

    def shutdown(self):
        if self.stage < 2:
            self.transport.abort()
        else:
            super().shutdown()


class Server(uvicorn.Server):
    """Serves an application and ends in time.

    started, stopping: called when it listens, and when it begins to end. removed: called before a process that has not
    ended by itself is made to.
    """

    def __init__(self, app, started: Callable, stopping: Callable, remove: Callable):
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level="error",  # warnings are about what strangers send
            access_log=False,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self._started, self._stopping, self._remove = started, stopping, remove

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self._started()

    async def on_tick(self, counter):
        if counter % 10 == 0:  # ten a second
            for connection in list(self.server_state.connections):
                connection.end_if_overdue()
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None):
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of answers that are broken off nobody need know
        self._stopping()
        await super().shutdown(sockets)

    def handle_exit(self, sig, frame):
        if not self.should_exit:  # the first one
            end = threading.Timer(STOP_SECONDS, self._end, [128 + sig])
            end.daemon = True
            end.start()
        super().handle_exit(sig, frame)

    def _end(self, exit_code: int) -> None:
        """For a process that waits for a thread which decodes a picture, say."""
        self._remove()
        os._exit(exit_code)


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, taken before anything heavy is started. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # bound alone, two servers that start at once would both have it
        return listener
    except (OSError, UnicodeError) as error:  # the latter: a name that none can be
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port} cannot be listened on ({reason}). Choose another --port or --host.") from None


def allow_files() -> None:
    """Let this process open as many files and connections as it may, and leave enough of them for files."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    Connection.most = min(MAX_CONNECTIONS, most // 4)
