"""The HTTP/1.1 protocol of the server in front of the web app.

uvicorn's default parser, httptools, ends a request at an `Upgrade` header: the body of a client
that offers HTTP/2 (`curl --http2`, Java's HttpClient) is lost, and what follows it is taken for a
request of its own. h11 ignores the offer, as RFC 9110, 7.8 allows.
"""

from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.error_responses import MESSAGES, RequestError


class HttpProtocol(H11Protocol):
    """Ignores offers of other protocols; answers malformed requests with our JSON error."""

    def send_400_response(self, msg: str) -> None:
        """Closes the connection: where the next request begins cannot be known."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # a response has begun already
            return
        response = RequestError("bad_request", MESSAGES["bad_request"]).response()
        status = HTTPStatus(response.status_code)
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Ignoring an offer is no fault that a log should show."""
