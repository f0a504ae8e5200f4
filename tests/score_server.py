"""A small real score server: http.server in a thread, and a real engine. It keeps to the wire
contract of serve/, and can be told to answer otherwise first, as a server in trouble does."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from selectmoe.data.rows import RowLocation, parse_row
from selectmoe.model.checkpoint import hash_weights
from selectmoe.paths import EMBEDDED_SELECTOR
from selectmoe.records import RejectedRow, UnscoredSample
from selectmoe.scoring.calibration import as_json
from selectmoe.scoring.engine import ScoringEngine


@dataclass
class Trouble:
    """What a request gets instead of its answer; status 0 is a connection that breaks."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "the queue is full", "error_type": "overloaded"}'
    delay_seconds: float = 0.0


@dataclass
class ScoreServer:
    engine: ScoringEngine
    api_key: str | None = None
    max_samples: int = 1_024
    max_body_bytes: int = 8_000_000
    troubles: list[Trouble | None] = field(default_factory=list)
    """What the next requests for scores get, None for their answer; later ones are answered."""
    requests: list[tuple[str, dict]] = field(default_factory=list)
    """Every request that was read, with the content of its body."""
    num_at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def info(self) -> dict:
        return {
            "model": "embedded",
            "revision": None,
            "weights_hash": hash_weights(str(EMBEDDED_SELECTOR), None),
            "formula": "answer_margin",
            "length": self.engine.length,
            "turns": self.engine.config.turns,
            "dtype": "float32",
            "calibration": self.engine.calibration and as_json(self.engine.calibration),
            "limits": {
                "max_samples_per_request": self.max_samples,
                "max_body_bytes": self.max_body_bytes,
                "max_sequence_length": self.engine.tokenizer.max_sequence_length,
                "max_tokens_per_batch": self.engine.max_tokens_per_batch,
            },
        }

    def results(self, rows: list[object], detail: str) -> list[dict]:
        parsed = [parse_row(row, RowLocation("request", n, "")) for n, row in enumerate(rows, 1)]
        good = [row for row in parsed if not isinstance(row, RejectedRow)]
        with self.lock:  # one engine, as in a replica
            outcomes = iter(self.engine.score(good))
        results = []
        for row in parsed:
            entry: dict = {"id": row.sample_id}
            if isinstance(row, RejectedRow):
                entry |= {"error": row.detail, "error_type": "validation"}
            elif isinstance(outcome := next(outcomes), UnscoredSample):
                entry |= {
                    "error": outcome.detail,
                    "error_type": "validation",
                    "reason": outcome.reason,
                }
            else:
                entry |= {
                    "score": outcome.score,
                    "percentile": None,
                    "num_tokens": outcome.num_tokens,
                    "num_answer_tokens": outcome.num_answer_tokens,
                    "truncated": outcome.truncated,
                }
                if detail == "layers":
                    entry["layers"] = outcome.layer_scores.tolist()
            results.append(entry)
        return results


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections, as real servers do
    app: ScoreServer

    def do_GET(self) -> None:
        self.handle_request({})

    def do_POST(self) -> None:
        self.handle_request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def handle_request(self, content: dict) -> None:
        app = self.app
        app.requests.append((self.path, content))
        app.num_at_once += 1
        app.most_at_once = max(app.most_at_once, app.num_at_once)
        try:
            self.answer(content)
        finally:
            app.num_at_once -= 1

    def answer(self, content: dict) -> None:
        app = self.app
        trouble = app.troubles.pop(0) if app.troubles and self.path == "/score" else None
        if trouble is not None:
            time.sleep(trouble.delay_seconds)
            if trouble.status:
                self.reply(trouble.status, trouble.body, trouble.headers)
            self.close_connection = not trouble.status
            return
        if app.api_key and self.headers["Authorization"] != f"Bearer {app.api_key}":
            self.reply(401, b'{"error": "no or wrong key", "error_type": "unauthorized"}')
        elif self.path == "/info":
            self.reply(200, json.dumps(app.info()).encode())
        elif self.path != "/score":
            self.reply(404, b"<h1>Not Found</h1>")
        elif len(content["samples"]) > app.max_samples:
            self.reply(413, b'{"error": "too many samples", "error_type": "too_large"}')
        else:
            found = app.results(content["samples"], content["detail"])
            if all(entry.get("error_type") == "validation" for entry in found):
                self.reply(422, json.dumps(found[0]).encode())
            else:
                self.reply(200, json.dumps({"results": found}).encode())

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 (its name there)
        pass


@contextlib.contextmanager
def running(app: ScoreServer, *, port: int = 0) -> Iterator[ScoreServer]:
    handler = type("AppHandler", (Handler,), {"app": app})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        app.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield app
        finally:
            server.shutdown()
            thread.join()
