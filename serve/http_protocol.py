"""The HTTP/1.1 protocol of the server in front of the web app.

uvicorn's default parser, httptools, ends a request at an `Upgrade` header: the body of a client
that offers HTTP/2 (`curl --http2`, Java's HttpClient) is lost, and what follows it is taken for a
request of its own. h11 ignores the offer, as RFC 9110, 7.8 allows.
"""

import asyncio
import re
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.error_responses import MESSAGES, RequestError

_WEBSOCKET_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64
HEADER_TIMEOUT_SECONDS = 60.0  # from the first byte, or from the start of the connection


class HttpProtocol(H11Protocol):
    """Ignores offers of other protocols; malformed requests, and those whose headers do not end,
    get our JSON error."""

    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()  # of a request that has begun while this one was answered

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError("bad_request", MESSAGES["bad_request"]))

    def _watch_headers(self) -> None:
        """Starts the timer where a request has begun and its headers have not ended."""
        is_idle = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        begun = is_idle and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if not begun:
            self._stop_watching()
        elif self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self._end_waiting)

    def _stop_watching(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _end_waiting(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(
                RequestError("timeout", "the headers of the request did not arrive in time")
            )
        else:
            self.transport.close()  # nothing was asked

    def _refuse(self, error: RequestError) -> None:
        """Closes the connection: where the next request begins cannot be known."""
        if self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # a response has begun already
            return
        response = error.response()
        status = HTTPStatus(response.status_code)
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _get_upgrade(self) -> bytes | None:
        """What is no handshake by RFC 6455, 4.1 is a request whose offer is ignored: uvicorn's
        WebSocket answers it in plain text, or waits for ever where there is a body."""
        headers = dict(self.headers)
        is_handshake = (
            self.scope["method"] == "GET"
            and headers.get(b"sec-websocket-version") == b"13"
            and _WEBSOCKET_KEY.fullmatch(headers.get(b"sec-websocket-key", b"")) is not None
            and headers.get(b"content-length", b"0") == b"0"
            and b"transfer-encoding" not in headers
        )
        return super()._get_upgrade() if is_handshake else None

    def _unsupported_upgrade_warning(self) -> None:
        """Ignoring an offer is no fault that a log should show."""
