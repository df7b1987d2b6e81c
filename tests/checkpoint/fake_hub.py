"""A hub on the loopback interface: what huggingface_hub's client asks of the real one to read a model, and no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40


class FakeHub:
    """Serves the files of one folder as the model ``owner/tiny``; ``log`` lists (method, file, range) of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.ranges = True
        self.short: set[str] = set()  # files that end early, as those of a broken proxy
        self.log: list[tuple[str, str, str | None]] = []

    def listing(self) -> dict[str, object]:
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        siblings = [
            {"rfilename": file.relative_to(self.folder).as_posix(), "size": file.stat().st_size} for file in files
        ]
        return {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}

    def fetched(self) -> set[str]:
        return {name for method, name, _ in self.log if method == "GET"}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _answer(self, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                if parts[2:4] != ["owner", "tiny"]:
                    self._refuse("RepoNotFound")
                elif parts[4:] not in (["revision", "main"], ["revision", COMMIT]):
                    self._refuse("RevisionNotFound")
                else:
                    self._send(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"}, True)
                return
            file = hub.folder / "/".join(parts[4:])
            if parts[:2] != ["owner", "tiny"] or not file.is_file():
                self._refuse("EntryNotFound")
                return
            asked = self.headers.get("Range")
            hub.log.append(("GET" if body else "HEAD", file.name, asked))
            data, status = file.read_bytes(), 200
            extra = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if file.name in hub.short:
                data = data[: len(data) // 2]
            if asked and hub.ranges:
                first, last = asked.removeprefix("bytes=").split("-")
                extra["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                data, status = data[int(first) : int(last or len(data)) + 1], 206
            self._send(status, data, extra, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler


@contextmanager
def serve(folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve ``folder`` and point huggingface_hub in this process at it, with an empty cache."""
    from huggingface_hub import constants

    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
