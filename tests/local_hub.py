"""A hub on loopback that speaks the hub's protocol to the real huggingface_hub client: no test downloads.

Repositories are folders. What has been asked for is kept, so that a test can say how often. `python -m
tests.local_hub NAME=FOLDER …` serves models until it is ended.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_localhubtokenlocalhubtoken"  # the only one it knows
PIECE = 1 << 16


@dataclass
class Repo:
    folder: Path
    kind: str = "model"
    gated: bool = False  # its files are for the token alone
    private: bool = False  # … and so is that it exists
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> name -> content
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str = "main") -> str:
        """What the folder holds now becomes the newest commit of that branch."""
        files = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha1()
        for name, content in files.items():
            digest.update(name.encode() + b"\0" + hashlib.sha1(content).digest())
        self.commits[digest.hexdigest()] = files
        self.refs[ref] = digest.hexdigest()
        return digest.hexdigest()


class LocalHub:
    """`url` goes into HF_ENDPOINT."""

    def __init__(self, *, bytes_per_second: float | None = None) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.asked: list[tuple[str, str]] = []  # (method, path)
        self.tokens: Counter[str | None] = Counter()  # of those who asked for something of a repository
        self.bytes_per_second = bytes_per_second
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, folder: str | Path, *, kind: str = "model", **access: Any) -> str:
        """Returns the commit."""
        repo = self.repos[kind, name] = Repo(Path(folder), kind, **access)
        return repo.commit()

    def downloads(self) -> Counter[str]:
        """How often each file has been sent, by its path without the revision."""
        sent: Counter[str] = Counter()
        for method, path in self.asked:
            if method == "GET" and "/resolve/" in path:
                repo, _, rest = path.partition("/resolve/")
                sent[f"{repo.strip('/')}/{rest.partition('/')[2]}"] += 1
        return sent


@contextmanager
def local_hub(**options: Any) -> Iterator[LocalHub]:
    hub = LocalHub(**options)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.asked.append((self.command, path))
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        if path.count("/") > 2:  # the client also asks, without a token, what the hub knows of its callers
            self.hub.tokens[token] += 1
        try:
            if token not in (None, TOKEN):
                raise _Refused(401, "", "Invalid credentials in Authorization header")
            if path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), parse_qs(parts.query), body, token)
            else:
                self._file(path, token)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, b"{}", {key: value for key, value in headers.items() if value})

    def _repo(self, kind: str, name: str, token: str | None) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and token is None):
            raise _Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _api(self, path: str, query: dict[str, list[str]], body: bytes, token: str | None) -> None:
        if path.count("/") < 2:
            raise _Refused(404)
        plural, owner, name, *rest = path.split("/")
        kind = plural.removesuffix("s")
        repo = self._repo(kind, f"{owner}/{name}", token)
        verb = rest[0] if rest else "revision"
        if verb == "revision":
            commit = self._commit(repo, "/".join(rest[1:]) or "main")
            self._json(
                {
                    "_id": "0",
                    "id": f"{owner}/{name}",
                    "sha": commit,
                    "private": repo.private,
                    "gated": "manual" if repo.gated else False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": file} for file in repo.commits[commit]],
                }
            )
        elif verb == "tree":
            commit, folder = self._commit(repo, rest[1]), "/".join(rest[2:])
            recursive = query.get("recursive", ["False"])[0].lower() == "true"
            self._json(_entries(repo.commits[commit], folder, recursive=recursive))
        elif verb == "paths-info":
            commit = self._commit(repo, rest[1])
            fields = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            files = repo.commits[commit]
            everything = {entry["path"]: entry for entry in _entries(files, "", recursive=True)}
            self._json([everything[p] for p in fields.get("paths", []) if p in everything])
        else:
            raise _Refused(404)

    def _file(self, path: str, token: str | None) -> None:
        kind = "dataset" if path.startswith("/datasets/") else "model"
        path = path.removeprefix("/datasets").lstrip("/")
        where, _, rest = path.partition("/resolve/")
        repo = self._repo(kind, where, token)
        if repo.gated and token is None:
            raise _Refused(401, "GatedRepo", f"Access to model {where} is restricted.")
        revision, _, name = rest.partition("/")
        commit = self._commit(repo, revision)
        content = repo.commits[commit].get(name)
        if content is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {
            "ETag": f'"{_blob_id(content)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        given = self.headers.get("Range")
        if given is None:
            self._send(200, content, headers)
            return
        first, _, last = given.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(content)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], headers)

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        rate = self.hub.bytes_per_second
        for start in range(0, len(content), PIECE):
            self.wfile.write(content[start : start + PIECE])
            if rate is not None:
                time.sleep(PIECE / rate)


def _entries(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        first, _, below = name.removeprefix(prefix).partition("/")
        if below:
            found[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
        if not below or recursive:
            found[name] = {"type": "file", "path": name, "oid": _blob_id(content), "size": len(content)}
    return list(found.values())


def _blob_id(content: bytes) -> str:
    """As git has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def main() -> None:
    hub = LocalHub()
    for word in sys.argv[1:]:
        name, _, folder = word.partition("=")
        print(name, hub.add(name, folder), flush=True)
    print(f"HF_ENDPOINT={hub.url}", flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
