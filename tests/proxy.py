"""A connection that breaks when it is told to: a TCP proxy between a client and its server."""

import re
import socket
import threading
from contextlib import suppress

_BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Listens on 127.0.0.1, and passes everything on to a server until it is told otherwise."""

    def __init__(self, server):
        """Stand before a server at host:port."""
        host, _, port = server.partition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._lock = threading.Lock()
        self._open = set()
        self._left = None  # bytes that may still go to the server; None: any number
        self._is_busy = False
        self._unanswered = set()  # clients whose request the server has not answered
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in `accept`
        self._thread.join()
        self._listener.close()
        self._break()

    def cut(self, after):
        """Pass so many more bytes to the server, and break every connection from then on."""
        with self._lock:
            self._left = after

    def refuse(self):
        """Answer every request with 503 from now on."""
        self._is_busy = True
        self._break()

    @property
    def is_idle(self):
        """Whether every request so far was answered."""
        return not self._unanswered

    def mend(self):
        """Pass everything on again."""
        with self._lock:
            self._left, self._is_busy = None, False

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, suppress(OSError):
            if self._is_busy:
                _answer_busy(client)
            elif self._left != 0:
                with socket.create_connection(self._server) as server:
                    self._join(client, server)

    def _join(self, client, server):
        with self._lock:
            self._open |= {client, server}
        back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
        back.start()
        self._pump(client, server, upwards=True)
        back.join()
        with self._lock:
            self._open -= {client, server}
            self._unanswered.discard(client)

    def _pump(self, source, sink, upwards=False):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if upwards:
                    self._unanswered.add(source)
                    data = self._passed(data)
                sink.sendall(data)
                if not upwards:
                    self._unanswered.discard(sink)
                if self._left == 0:
                    break
        for end in (source, sink):
            _shut(end)

    def _passed(self, data):
        with self._lock:
            if self._left is None:
                return data
            data = data[: self._left]
            self._left -= len(data)
            return data

    def _break(self):
        with self._lock:
            for end in self._open:
                _shut(end)


def _shut(end):
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _answer_busy(client):
    client.settimeout(10)
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := client.recv(1 << 16)):
            return
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    while length and b"100-continue" not in head and len(body) < int(length[1]):
        if not (more := client.recv(1 << 16)):
            return
        body += more
    client.sendall(_BUSY)
    client.shutdown(socket.SHUT_WR)
    while client.recv(1 << 16):
        pass


def s3_uri(address, path):
    """The address of a folder in the bucket of a server of the tests'."""
    return f"s3://tests/{path}?endpoint_override={address}&scheme=http&region=us-east-1"
