"""Character devices on sockets: Unix and TCP, listening or connecting, one connection at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import threading

from ..errors import UsageError
from .base import Chardev, Loop


class Socket(Chardev):
    """A stream socket. As a *server* it listens, and takes the next client when the last one has gone.

    With *wait* a server's :meth:`open` returns only when the first client is there.
    """

    kind = "socket"

    def __init__(
        self,
        id: str,
        *,
        path: str | None = None,
        host: str = "",
        port: int = 0,
        server: bool = False,
        wait: bool = True,
        nodelay: bool = True,
    ) -> None:
        super().__init__(id)
        self.path, self.host, self.port = path, host, port
        self.server, self.wait, self.nodelay = server, wait, nodelay
        self.address = f"unix:{path}" if path is not None else f"tcp:{host}:{port}"
        self._suffix = ",server=on" if server else ""
        self.filename = f"disconnected:{self.address}{self._suffix}"
        self._loop: Loop | None = None
        self._listener: socket.socket | None = None
        self._peer: socket.socket | None = None
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._bound: tuple[int, int] | None = None

    def open(self, loop: Loop) -> None:
        self._loop = loop
        try:
            if self.server:
                self._listen()
            else:
                self._adopt(self._connect())
        except OSError as error:
            verb = "listen on" if self.server else "connect to"
            raise UsageError(f"chardev {self.id}: cannot {verb} {self.address}: {error.strerror or error}") from None

    def _connect(self) -> socket.socket:
        if self.path is None:
            return socket.create_connection((self.host or "localhost", self.port))
        made = socket.socket(socket.AF_UNIX)
        made.connect(self.path)
        return made

    def _listen(self) -> None:
        assert self._loop is not None
        if self.path is not None:
            self._listener = self._listen_unix(self.path)
        else:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            self._listener = socket.create_server((self.host, self.port), family=family, backlog=1)
            self.port = self._listener.getsockname()[1]
            self.address = f"tcp:{self.host}:{self.port}"
            self.filename = f"disconnected:{self.address}{self._suffix}"
        if self.wait:
            print(f"vm: waiting for connection on: {self.filename}", file=sys.stderr, flush=True)
            peer, _ = self._listener.accept()
            self._listener.setblocking(False)
            self._adopt(peer)
        else:
            self._listener.setblocking(False)
            self._loop.call_soon(self._await_client)

    def _listen_unix(self, path: str) -> socket.socket:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):  # left by an earlier run; a file is never removed
                os.unlink(path)
        made = socket.socket(socket.AF_UNIX)
        try:
            made.bind(path)
        except OSError:
            made.close()
            raise
        made.listen(1)
        status = os.lstat(path)
        self._bound = (status.st_dev, status.st_ino)
        return made

    def _await_client(self) -> None:
        listener = self._listener
        if listener is not None and self._loop is not None:
            self._loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        listener = self._listener
        if listener is None or self._loop is None:
            return
        try:
            peer, _ = listener.accept()
        except OSError:  # gone again before we came
            return
        self._loop.remove_reader(listener.fileno())
        self._adopt(peer)

    def _adopt(self, peer: socket.socket) -> None:
        assert self._loop is not None
        peer.setblocking(False)
        if self.path is None and self.nodelay:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._peer = peer
            self._pending.clear()
        self.filename = f"{self.address}{self._suffix}"
        self._loop.call_soon(self.on_open)
        self._loop.call_soon(self._watch_peer)

    def _watch_peer(self) -> None:
        peer = self._peer
        if peer is not None and self._loop is not None:
            self._loop.add_reader(peer.fileno(), self._readable)

    def _readable(self) -> None:
        peer = self._peer
        if peer is None:
            return
        try:
            data = peer.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.on_data(data)
        else:
            self._disconnect()

    def _disconnect(self) -> None:
        with self._lock:
            peer, self._peer = self._peer, None
            self._pending.clear()
        if peer is None or self._loop is None:
            return
        self._loop.remove_reader(peer.fileno())
        self._loop.remove_writer(peer.fileno())
        peer.close()
        self.filename = f"disconnected:{self.address}{self._suffix}"
        self.on_close()
        self._await_client()

    def write(self, data: bytes) -> None:
        with self._lock:
            if self._peer is None or self._loop is None:
                return
            if not self._pending:
                try:
                    data = data[self._peer.send(data) :]
                except BlockingIOError:
                    pass
                except OSError:  # the reader finds out and disconnects
                    return
            if data:
                if not self._pending:
                    self._loop.call_soon(self._watch_writable)
                self._pending += data

    def _watch_writable(self) -> None:
        peer = self._peer
        if peer is not None and self._loop is not None:
            self._loop.add_writer(peer.fileno(), self._writable)

    def _writable(self) -> None:
        with self._lock:
            if self._peer is None or self._loop is None:
                return
            try:
                del self._pending[: self._peer.send(self._pending)]
            except BlockingIOError:
                return
            except OSError:
                self._pending.clear()
            if not self._pending:
                self._loop.remove_writer(self._peer.fileno())

    def drain(self, timeout: float = 1.0) -> None:
        with self._lock:
            if self._peer is None or not self._pending:
                return
            self._peer.settimeout(timeout)
            with contextlib.suppress(OSError):
                self._peer.sendall(self._pending)
            self._pending.clear()

    def close(self) -> None:
        with self._lock:
            peer, self._peer = self._peer, None
            listener, self._listener = self._listener, None
        for made in (peer, listener):
            if made is not None:
                if self._loop is not None:
                    # Returns when what was queued for the loop before has run: nothing uses the descriptor any more.
                    self._loop.remove_reader(made.fileno())
                    self._loop.remove_writer(made.fileno())
                made.close()
        if self.path is not None and self._bound is not None:
            with contextlib.suppress(OSError):
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._bound:
                    os.unlink(self.path)
            self._bound = None
