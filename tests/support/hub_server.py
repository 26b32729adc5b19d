"""A small HuggingFace hub on localhost: datasets and models, as `datasets` and `huggingface_hub` ask for them."""

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
    """Serves `repositories` of datasets, {id: {path: content}}, all at one commit; and of models, by branch.

    models: {id: {branch: {path: content}}}; each branch is at a commit of its own. Of files over 1,000 bytes the hub
        lists the SHA-256, as of those in Git LFS.
    unlisted: "id@branch" of models whose files it refuses to list.
    drops: {"id/path" of a file: number of requests for its content that are cut off half-way}; counted down.
    refusals: {part of an address: number of requests of it that are answered with 429 and `Retry-After: 1`}.
    stalls: "id/path" of files whose content stops half-way, with the connection left open; `stalled` is set then.
    requests: "METHOD path" of all that was asked.
    """

    def __init__(
        self,
        repositories: dict[str, dict[str, bytes]] | None = None,
        models: dict[str, dict[str, dict[str, bytes]]] | None = None,
    ) -> None:
        self.repositories = repositories or {}
        self.models = models or {}
        self.unlisted: set[str] = set()
        self.drops: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.stalls: set[str] = set()
        self.stalled = threading.Event()
        self._closing = threading.Event()
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

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
                address = unquote(self.path)
                for part in [part for part, left in hub.refusals.items() if left > 0 and part in address]:
                    hub.refusals[part] -= 1
                    self._come_again()
                    return
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if parts[:2] == ["api", "datasets"]:
                    self._api("/".join(parts[2:4]), parts[4:])
                elif parts[:2] == ["api", "models"]:
                    self._model_api("/".join(parts[2:4]), parts[4:])
                elif parts[2:3] == ["resolve"] and "/".join(parts[:2]) in hub.models:
                    self._model_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
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

            def _model_api(self, repository: str, rest: list[str]) -> None:
                branches = hub.models.get(repository)
                if branches is None:
                    self._refuse("RepoNotFound")
                elif rest[:1] == ["refs"]:
                    refs = [
                        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(repository, name)}
                        for name in branches
                    ]
                    self._json({"branches": refs, "converts": [], "tags": []})
                elif rest[:1] == ["tree"]:
                    name = hub.branch(repository, rest[1])
                    if name is None or f"{repository}@{name}" in hub.unlisted:
                        self._refuse("RevisionNotFound")
                    else:
                        self._json([hub._entry(path, content, lfs=True) for path, content in branches[name].items()])
                elif rest[:1] == ["revision"] or not rest:
                    name = hub.branch(repository, rest[1] if rest else "main")
                    if name is None:
                        self._refuse("RevisionNotFound")
                        return
                    siblings = [{"rfilename": path} for path in branches[name]]
                    commit = commit_of(repository, name)
                    self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})
                else:
                    self._refuse("EntryNotFound")

            def _model_file(self, repository: str, revision: str, path: str, body: bool) -> None:
                name = hub.branch(repository, revision)
                if name is None:
                    self._refuse("RevisionNotFound")
                else:
                    content = hub.models[repository][name].get(path)
                    self._send(content, f"{repository}@{name}/{path}", commit_of(repository, name), body)

            def _file(self, repository: str, path: str, body: bool) -> None:
                self._send(hub.repositories.get(repository, {}).get(path), f"{repository}/{path}", COMMIT, body)

            def _send(self, content: bytes | None, name: str, commit: str, body: bool) -> None:
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
                self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if not body:
                    return
                if hub.drops[name] > 0:
                    hub.drops[name] -= 1
                    self.wfile.write(content[start : (start + end) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return
                if name in hub.stalls:
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

            def _come_again(self) -> None:
                self.send_response(429)
                self.send_header("Retry-After", "1")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def _refuse(self, code: str) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler

    def branch(self, repository: str, revision: str) -> str | None:
        """The branch that a name or a commit means."""
        names = self.models.get(repository, {})
        return next((name for name in names if revision in (name, commit_of(repository, name))), None)

    @staticmethod
    def _entry(path: str, content: bytes, lfs: bool = False) -> dict[str, Any]:
        entry = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
        if lfs and len(content) > 1_000:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry


def commit_of(repository: str, branch: str) -> str:
    """The commit that a branch of a model is at."""
    return hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()
