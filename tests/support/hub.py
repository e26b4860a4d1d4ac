"""A Hub of one's own on this machine: what huggingface_hub asks of it to push and to pull, and what goes wrong."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


class Hub:
    """`files` of each repository by name; `requests` that came, as (method, path)."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, object] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_short: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def revision(self, repo: str) -> str:
        """Changes with every commit."""
        content = sorted((name, hashlib.sha1(value).hexdigest()) for name, value in self.files[repo].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        length = headers.pop("length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_one(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if self.command in ("GET", "HEAD") and parts[2:3] == ["resolve"]:
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            return self.tree("/".join(parts[2:4]))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[0] == "lfs":  # as at a store of its own, whose address is the permission
            return self.store(parts[1], body)
        if given is None:
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if parts[0] == "verify":
            return self.answer(200 if parts[1] in hub.large else 404)
        repo = "/".join(parts[2:4])
        if repo.startswith("other/"):
            return self.refuse(403, "", "you have no right to write here")
        if parts[4:5] == ["preupload"]:
            modes = {".safetensors": "lfs"}
            files = [
                {
                    "path": f["path"],
                    "uploadMode": modes.get(os.path.splitext(f["path"])[1], "regular"),
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if parts[4:5] == ["commit"]:
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.refuse(404, "", f"nothing at {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def create(self, wanted: dict) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.hub.files:
            return self.answer(409, {"url": f"{self.hub.url}/{repo}"})
        self.hub.files[repo] = {".gitattributes": b""}
        self.hub.private[repo] = wanted.get("private") or wanted.get("visibility") == "private"
        self.answer(200, {"url": f"{self.hub.url}/{repo}"})

    def batch(self, wanted: dict) -> None:
        objects = [
            {
                **one,
                "actions": {
                    "upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{one['oid']}"},
                },
            }
            for one in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "not what was announced"})
        self.hub.large[oid] = body
        self.answer(200)

    def commit(self, repo: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.large[value["oid"]]
        sha = self.hub.revision(repo)
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def tree(self, repo: str) -> None:
        if repo not in self.hub.files:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        files = self.hub.files[repo].items()
        self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files])

    def resolve(self, repo: str, revision: str, file: str) -> None:
        if repo not in self.hub.files:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        sha = self.hub.revision(repo)
        if revision not in ("main", sha):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if file not in self.hub.files[repo]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = self.hub.files[repo][file]
        facts = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": sha}
        facts["X_Linked_Size"] = str(len(content))
        self.answer(200, content[: len(content) // 2] if file in self.hub.cut_short else content, **facts)


class Commands:
    """`lpt` in a process of its own, whose Hub is at `url`: its client reads the address once, when it is imported."""

    PROGRAM = (
        "import contextlib, io, json, os, sys\n"
        "from lpt import cli\n"
        "for line in sys.stdin:\n"
        "    words, changes = json.loads(line)\n"
        "    for name, value in changes.items():\n"
        "        os.environ[name] = value\n"
        "    sys.argv, out, err, code = ['lpt', *words], io.StringIO(), io.StringIO(), 0\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try:\n"
        "            cli.main()\n"
        "        except SystemExit as leave:\n"
        "            code = int(leave.code or 0)\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)\n"
    )

    def __init__(self, url: str, home: str):
        left_out = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in left_out}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, *words: object, **environment: str) -> tuple[int, str, str]:
        """(exit code, what was printed, what was said on the error stream)."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([list(map(str, words)), environment]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
