"""A server on this machine that speaks the few routes of the Hugging Face hub that huggingface_hub asks for.

Repositories are folders; a commit is a digest of the files. `asked` records every request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?")
ROOT = Path(__file__).parents[2]


class Hub:
    """Add repositories with `add`; `gated`, `private` and `broken` are sets of their names."""

    def __init__(self):
        self.folders: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.broken: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    def add(self, name: str, folder: Path, kind: str = "models") -> str:
        """Put a folder there and return its commit."""
        self.folders[f"{kind}/{name}"] = folder
        return self.commit(f"{kind}/{name}")

    def commit(self, key: str) -> str:
        digest = hashlib.sha1(key.encode())
        for path in self.files(key):
            digest.update(path.encode() + (self.folders[key] / path).read_bytes())
        return digest.hexdigest()

    def files(self, key: str) -> list[str]:
        folder = self.folders[key]
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            hub.asked.append(f"{self.command} {self.path}")
            sent = self.headers.get("authorization")
            hub.tokens.add(sent)
            if match := _API.fullmatch(self.path):
                kind, name, route, revision = match.groups()
                key, file = f"{kind}/{name}", None
            elif match := _FILE.fullmatch(self.path):
                dataset, name, revision, file = match.groups()
                key = f"{'datasets' if dataset else 'models'}/{name}"
            else:
                return self.answer(404)
            if key not in hub.folders or (key in hub.private and sent != "Bearer good"):
                return self.answer(401, code="RepoNotFound")
            if key in hub.broken:
                return self.answer(500)
            commit = hub.commit(key)
            if revision not in (None, "main", "v1", commit):
                return self.answer(404, code="RevisionNotFound")
            if file is None:
                sizes = {f: hub.sizes.get(f, (hub.folders[key] / f).stat().st_size) for f in hub.files(key)}
                if route == "tree":  # huggingface_hub 1 asks for it
                    tree = [
                        {"type": "file", "path": f, "size": size, "oid": "0" * 40}
                        for f, size in sizes.items()
                    ]
                    return self.answer(200, json.dumps(tree).encode())
                siblings = [{"rfilename": f, "size": size} for f, size in sizes.items()]
                about = {
                    "id": name,
                    "sha": commit,
                    "private": False,
                    "gated": key in hub.gated,
                    "siblings": siblings,
                }
                return self.answer(200, json.dumps(about | {"tags": [], "downloads": 0}).encode())
            if key in hub.gated and sent != "Bearer good":
                return self.answer(403, code="GatedRepo", commit=commit)
            if file not in hub.files(key):
                return self.answer(404, code="EntryNotFound", commit=commit)
            return self.answer(200, (hub.folders[key] / file).read_bytes(), commit=commit)

        def answer(self, status, body=b"", code=None, commit=None):
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            headers |= {"X-Error-Code": code} if code else {}
            headers |= {"X-Repo-Commit": commit} if commit else {}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def serve(hub: Hub):
    """The address of a server for the hub, inside the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


_RUN = """
import json, sys, traceback
from click.testing import CliRunner
from kvcat_nemo.cli import main
from kvcat_nemo.models import hub
for call in json.loads(sys.argv[1]):
    if call[0] == "kvcat":
        done = CliRunner().invoke(main, call[1:])
        if done.exception and not isinstance(done.exception, SystemExit):
            traceback.print_exception(done.exception)
        print(json.dumps([done.exit_code, done.output]))
        continue
    name, *options = call[1:]
    try:
        function = {"model": hub.model_folder, "dataset": hub.dataset_files}[call[0]]
        found = function(name, **options[0]) if options else function(name)
        print(json.dumps(sorted(map(str, found)) if isinstance(found, list) else str(found)))
    except ValueError as error:
        print(json.dumps("ERROR " + str(error)))
"""


def run(calls: list[list], endpoint: str, cache: Path, cwd: Path, **environment) -> list:
    """Make calls in one fresh process, because huggingface_hub reads its environment once.

    Args:
        calls: ["model", name, {options}], ["dataset", name, {options}] or ["kvcat", words…].

    Returns:
        For each a path, a list of paths or "ERROR message"; for a command its exit code and output.
    """
    own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    own |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    own |= {
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps(calls)], capture_output=True, text=True, cwd=cwd, env=own | environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("[", '"'))]
    assert len(lines) == len(calls), done.stdout + done.stderr
    return [json.loads(line) for line in lines]
