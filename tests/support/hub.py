"""A hub on loopback that speaks as much of huggingface.co's protocol as its client needs.

``faults`` are what goes wrong, one for each request of a file (``API`` for the metadata),
first come, first served. ``served`` has every range of every file that was sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: The name of the metadata among the faults.
API = "api"
_BLOCK = 16 * 1024
_RESOLVE = re.compile(
    r"/(?P<cdn>cdn/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)
_MODEL = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?P<check>/auth-check)?")


@dataclass(frozen=True)
class Fault:
    """``status`` answers that instead; else the body is cut (or stalls) after ``after`` bytes.

    ``error_code`` is the hub's own, in its header.
    """

    status: int | None = None
    error_code: str | None = None
    retry_after: str | None = None
    after: int | None = None
    stall_s: float = 0.0


@dataclass(frozen=True)
class Repo:
    files: dict[str, bytes]
    revision: str
    #: Names of files whose content is announced with another checksum.
    wrong: frozenset[str] = frozenset()
    #: Given to whoever has this token only.
    token: str | None = None
    #: Names of files that are stored as the small ones are.
    small: frozenset[str] = frozenset()


class Hub:
    """Serves ``repos``; ``url`` is its endpoint. Large files are redirected to ``/cdn``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        #: By file: where each answer began, and where it ended.
        self.served: dict[str, list[tuple[int, int]]] = defaultdict(list)
        #: Every request, as ``METHOD path``.
        self.requests: list[str] = []
        #: The keys that were presented to the hub, and to its content network.
        self.tokens: dict[str, set[str | None]] = {"hub": set(), "cdn": set()}
        #: Whether a part of a file can be asked for.
        self.ranges = True
        #: Of each file's body; None: as fast as it goes.
        self.bytes_per_s: int | None = None
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repo:
        listing = "".join(f"{key}{hashlib.sha256(files[key]).hexdigest()}" for key in sorted(files))
        repo = Repo(files, hashlib.sha1(listing.encode()).hexdigest(), **options)
        self.repos[name] = repo
        return repo

    def fail(self, name: str, *faults: Fault) -> None:
        self.faults[name].extend(faults)

    def bytes_of(self, name: str) -> int:
        return sum(end - begin for begin, end in self.served[name])

    def close(self) -> None:
        """Idempotent."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are the point of it."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        if (found := _MODEL.fullmatch(path)) is not None:
            hub.tokens["hub"].add(token)
            self._metadata(found, token)
        elif (found := _RESOLVE.fullmatch(path)) is not None:
            hub.tokens["cdn" if found["cdn"] else "hub"].add(token)
            self._file(found, token)
        else:
            self._refuse(Fault(404))

    def _metadata(self, found: re.Match[str], token: str | None) -> None:
        repo = self.server.hub.repos.get(found["repo"])
        if (fault := self._fault(API)) is not None:
            self._refuse(fault)
        elif repo is None:
            self._refuse(Fault(401 if token is None else 404, "RepoNotFound"))
        elif found["check"]:
            if repo.token not in (None, token):
                self._refuse(Fault(403, "GatedRepo"))
            else:
                self._send(200, b"OK")
        else:
            siblings = [self._sibling(repo, name) for name in repo.files]
            info = {
                "id": found["repo"],
                "modelId": found["repo"],
                "sha": repo.revision,
                "gated": "manual" if repo.token else False,
                "private": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
            self._send(200, json.dumps(info).encode(), {"content-type": "application/json"})

    def _sibling(self, repo: Repo, name: str) -> dict[str, Any]:
        content = repo.files[name]
        sibling = {"rfilename": name, "size": len(content), "blobId": etag(repo, name)}
        if name not in repo.small:
            sibling["blobId"] = "0" * 40
            sibling["lfs"] = {
                "sha256": etag(repo, name),
                "size": len(content),
                "pointerSize": 134,
            }
        return sibling

    def _file(self, found: re.Match[str], token: str | None) -> None:
        hub = self.server.hub
        repo, name = hub.repos.get(found["repo"]), found["name"]
        if (
            repo is None
            or name not in repo.files
            or found["revision"] not in (repo.revision, "main")
        ):
            self._refuse(Fault(404, "EntryNotFound"))
        elif not found["cdn"] and repo.token not in (None, token):
            self._refuse(Fault(403 if token else 401, "GatedRepo"))
        elif not found["cdn"] and name not in repo.small:
            headers = {
                "location": f"http://localhost:{self.server.server_port}/cdn{self.path}",
                "x-repo-commit": repo.revision,
                "x-linked-etag": f'"{etag(repo, name)}"',
                "x-linked-size": str(len(repo.files[name])),
            }
            self._send(302, b"", headers)
        else:
            self._content(repo, name)

    def _content(self, repo: Repo, name: str) -> None:
        content = repo.files[name]
        fault = self._fault(name)
        if fault is not None and fault.status is not None:
            self._refuse(fault)
            return
        begin, end, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        headers = {"etag": f'"{etag(repo, name)}"', "x-repo-commit": repo.revision}
        if asked is not None and self.server.hub.ranges:
            begin, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            headers["content-range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self.send_response(status)
        for key, value in {**headers, "content-length": str(end - begin)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        last = end if fault is None or fault.after is None else min(end, begin + fault.after)
        sent = begin
        try:
            while sent < last:
                block = content[sent : min(last, sent + _BLOCK)]
                self.wfile.write(block)
                sent += len(block)
                if rate := self.server.hub.bytes_per_s:
                    time.sleep(len(block) / rate)
        finally:
            self.server.hub.served[name].append((begin, sent))
        if fault is not None:
            time.sleep(fault.stall_s)
            self.close_connection = True

    def _fault(self, name: str) -> Fault | None:
        faults = self.server.hub.faults[name]
        return faults.popleft() if faults else None

    def _refuse(self, fault: Fault) -> None:
        headers = {"x-error-code": fault.error_code, "retry-after": fault.retry_after}
        given = {key: value for key, value in headers.items() if value is not None}
        self._send(fault.status or 500, b'{"error": "refused"}', given)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "content-length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def etag(repo: Repo, name: str) -> str:
    content = repo.files[name]
    if name in repo.wrong:
        content = b"something else"
    if name in repo.small:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()
