"""One HTTP connection, for clients that are slow, broken or hostile.

uvicorn's protocol on h11, with what it lacks: a limit on the time that a request may take to
arrive, errors in the shape of the inference protocol, and an end that the client can read. If a
connection is closed while the client still sends, its system throws the answer away; so what comes
after a refusal is read and dropped for a while.
"""

import asyncio
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from workbench.deploy.protocol import write_json

RECEIVE_S = 30.0  # for a request to arrive, from its first byte to its last
_LINGER_S = 5.0
_DROPPED_BYTES = 2**27  # of a body that was refused


class JoinedTransport:
    """A transport that sends what is written in one turn of the event loop with one system call.

    The head and the body of an answer are two writes, and each call costs more than parsing.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str):
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            self._transport.write(data)

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Connection(H11Protocol):
    """A server's side of one connection."""

    receive_s = RECEIVE_S

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(JoinedTransport(transport, self.loop))
        self._dropped_bytes, self._refused = 0, False
        self._timer = self.loop.call_later(self.receive_s, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        answered = self.cycle is not None and self.cycle.response_complete
        if self._refused or (answered and self.conn.their_state is h11.SEND_BODY):
            self._dropped_bytes += len(data)
            if self._dropped_bytes > _DROPPED_BYTES:
                self.transport.abort()
                return
        if self._refused:
            return
        super().data_received(data)
        if not self._arriving():
            self._stop_timer()
        elif self._timer is None and not self._refused:
            self._timer = self.loop.call_later(self.receive_s, self._late)

    def eof_received(self) -> None:
        """A client that ends in the middle may still read; one that ends later has left."""
        if self._arriving():
            self._refuse(400, "the connection ended before the request did")
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP. uvicorn calls this while h11's error is being handled."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        status = 400 if status >= 500 else status  # an encoding that nobody knows is no fault here
        self._refuse(status, f"not a valid HTTP request: {error or msg}")

    def _arriving(self) -> bool:
        """Whether a part of a request is here, and a part is not."""
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _late(self) -> None:
        self._timer = None
        if self._arriving():
            self._refuse(408, f"the request did not arrive within {self.receive_s:g} s")
        else:
            self.transport.close()  # it never sent anything

    def _refuse(self, status: int, reason: str) -> None:
        """Answer outside the application, and end the connection."""
        if self._refused:
            return
        self._refused = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        cycle = self.cycle
        unanswered = cycle is None or cycle.response_complete or not cycle.response_started
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # the application's answer would come too late
            cycle.message_event.set()
        if unanswered and not self.transport.is_closing():
            body = write_json({"error": reason})
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json"
                f"\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
