"""The part of the Hugging Face Hub's HTTP API that an upload uses, on a local port."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """What the hub was told: repositories with their settings, and the files of every commit."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self.token = token
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """(status, JSON) of a request that has the right token."""
        if path == "/api/repos/create":
            settings = json.loads(body)
            name = "/".join(filter(None, (settings.get("organization") or "me", settings["name"])))
            if name in self.repositories:
                return 409, {"url": f"{self.address}/{name}", "error": "exists"}
            self.repositories[name] = settings
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular"} for file in files]
            return 200, {"files": [mode | {"shouldIgnore": False} for mode in modes]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            commit = {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}
            return 200, commit | {"pullRequestUrl": None, "success": True}
        if method == "GET" and path.startswith("/api/models/"):
            return 200, {"id": path.removeprefix("/api/models/"), "sha": "0" * 40, "siblings": []}
        return 200, {"isValid": True}


@contextmanager
def fake_hub(*, token: str = "hf_token_of_the_tests") -> Iterator[FakeHub]:
    """A hub that accepts one token and answers everybody else 401."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = 401, {"error": "Invalid credentials"}
            if self.headers.get("Authorization") == f"Bearer {token}" or self.command == "HEAD":
                status, answer = hub.answer(self.command, self.path.partition("?")[0], body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}", token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
