"""A small HuggingFace hub on localhost: repositories of datasets, as `datasets` and `huggingface_hub` ask for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


class Hub:
    """Serves `repositories`, {id: {path: content}}, all at one commit.

    drops: {"id/path" of a file: number of requests for its content that are cut off half-way}; counted down.
    stalls: "id/path" of files whose content stops half-way, with the connection left open; `stalled` is set then.
    requests: "METHOD path" of all that was asked.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.drops: Counter[str] = Counter()
        self.stalls: set[str] = set()
        self.stalled = threading.Event()
        self._closing = threading.Event()
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                hub.requests.append(f"POST {self.path}")
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if parts[:2] == ["api", "datasets"] and "paths-info" in parts:
                    files = hub.repositories.get("/".join(parts[2:4]), {})
                    wanted = asked.get("paths", [])
                    self._json([hub._entry(path, files[path]) for path in wanted if path in files])
                else:
                    self._refuse("EntryNotFound")

            def _answer(self, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if parts[:2] == ["api", "datasets"]:
                    self._api("/".join(parts[2:4]), parts[4:])
                elif parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
                    self._file("/".join(parts[1:3]), "/".join(parts[5:]), body)
                else:
                    self._refuse("EntryNotFound")

            def _api(self, repository: str, rest: list[str]) -> None:
                files = hub.repositories.get(repository)
                if files is None:
                    self._refuse("RepoNotFound")
                elif rest[:1] == ["tree"]:
                    folder = "/".join(rest[2:])
                    inside = f"{folder}/" if folder else ""
                    recursive = "recursive=true" in self.path.lower()
                    entries: dict[str, Any] = {}
                    for path, content in files.items():
                        if not path.startswith(inside):
                            continue
                        child = path[len(inside) :].split("/")[0]
                        if recursive or inside + child == path:
                            entries[path] = hub._entry(path, content)
                        if inside + child != path:
                            entries[inside + child] = {
                                "type": "directory", "oid": hashlib.sha1(child.encode()).hexdigest(), "size": 0,
                                "path": inside + child,
                            }  # fmt: skip
                    if folder and not entries:
                        self._refuse("EntryNotFound")
                    else:
                        self._json(list(entries.values()))
                else:
                    siblings = [{"rfilename": path} for path in files]
                    self._json({"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

            def _file(self, repository: str, path: str, body: bool) -> None:
                content = hub.repositories.get(repository, {}).get(path)
                if content is None:
                    self._refuse("EntryNotFound")
                    return
                start, end = 0, len(content)
                asked = self.headers.get("Range", "")
                if asked.startswith("bytes="):
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start, end = int(first), min(end, int(last) + 1 if last else end)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(end - start))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if not body:
                    return
                if hub.drops[f"{repository}/{path}"] > 0:
                    hub.drops[f"{repository}/{path}"] -= 1
                    self.wfile.write(content[start : (start + end) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return
                if f"{repository}/{path}" in hub.stalls:
                    self.wfile.write(content[start : (start + end) // 2])
                    self.wfile.flush()
                    hub.stalled.set()
                    hub._closing.wait()
                    self.close_connection = True
                    return
                self.wfile.write(content[start:end])

            def _json(self, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def _refuse(self, code: str) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
