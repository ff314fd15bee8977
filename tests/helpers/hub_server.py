"""A Hugging Face hub on this machine: enough of its HTTP protocol to upload and to download.

Repositories, branches, commits (ndjson), LFS batches with basic transfer, file resolution. Faults
are injected by method and path: a status to answer with, or "drop" to close the connection.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_thisIsASecretOfTheTests"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[tuple[str, str]] = field(default_factory=list)  # (branch, title)


class Hub(ThreadingHTTPServer):
    """`repos` by name, `objects` by sha256, `log` of requests; `faults` are used up in turn."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[list] = []  # [method, pattern of the path, status or "drop", how often]
        self.readers_only = False  # the token may read and not write
        self.heard = lambda number: None  # told of each request, before it is answered
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was dropped on purpose is no news."""

    def fail(self, method: str, pattern: str, status, times: int = 10**6) -> None:
        self.faults.append([method, pattern, status, times])

    def requests(self, method: str, pattern: str) -> list[str]:
        return [path for m, path in self.log if m == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.serve("GET")

    def do_HEAD(self):
        self.serve("HEAD")

    def do_POST(self):
        self.serve("POST")

    def do_PUT(self):
        self.serve("PUT")

    def serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.log.append((method, path))
        self.server.heard(len(self.server.log))
        for fault in self.server.faults:
            if fault[0] == method and fault[3] > 0 and re.search(fault[1], path):
                fault[3] -= 1
                return self.drop() if fault[2] == "drop" else self.error(fault[2])
        routes = [
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("GET", r"/api/models/(\w+/[\w.-]+)(?:/revision/([\w.-]+))?", self.info),
            ("POST", r"/api/models/(\w+/[\w.-]+)/branch/([\w.-]+)", self.branch),
            ("POST", r"/api/models/(\w+/[\w.-]+)/preupload/([\w.-]+)", self.preupload),
            ("POST", r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", r"/lfs/(\w+)", self.lfs_put),
            ("POST", r"/api/models/(\w+/[\w.-]+)/commit/([\w.-]+)", self.commit),
            ("GET", r"/api/models/(\w+/[\w.-]+)/tree/([\w.-]+)/?", self.tree),
            ("HEAD", r"/(\w+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.resolve),
            ("GET", r"/(\w+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.resolve),
        ]
        for verb, pattern, handle in routes:
            if verb == method and (found := re.fullmatch(pattern, path)):
                return handle(body, *found.groups())
        self.error(404)

    # ------------------------------------------------------------------ answers

    def answer(self, value, status: int = 200, headers: dict | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int) -> None:
        headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
        self.answer({"error": f"injected {status}"}, status, headers)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def allowed(self, write: bool = True) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known:
            self.error(401)
        elif write and self.server.readers_only:
            self.error(403)
            return False
        return known

    # ------------------------------------------------------------------ repositories

    def create(self, body: bytes) -> None:
        if not self.allowed():
            return
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.server.repos:
            return self.answer({"url": f"{self.server.endpoint}/{name}"}, 409)
        self.server.repos[name] = Repo(private=wanted.get("visibility") == "private")
        self.answer({"url": f"{self.server.endpoint}/{name}", "name": name})

    def find(self, name: str, write: bool = False) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None:
            self.error(404)
        elif (write or repo.private) and not self.allowed(write):
            return None
        return repo

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (repo := self.find(name)) is None:
            return
        branch = revision or "main"
        if branch not in repo.branches and branch != self.sha(repo, "main"):
            return self.error(404)
        branch = branch if branch in repo.branches else "main"
        self.answer(
            {
                "id": name,
                "modelId": name,
                "private": repo.private,
                "sha": self.sha(repo, branch),
                "siblings": [{"rfilename": path} for path in repo.branches[branch]],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def sha(self, repo: Repo, branch: str) -> str:
        parts = [f"{p}{hashlib.sha256(d).hexdigest()}" for p, d in repo.branches[branch].items()]
        return hashlib.sha1("".join(sorted(parts)).encode()).hexdigest()

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if (repo := self.find(name, write=True)) is None:
            return
        if branch in repo.branches:
            return self.answer({"error": "exists"}, 409)
        repo.branches[branch] = dict(repo.branches["main"])
        self.answer({})

    # ------------------------------------------------------------------ upload

    def validate_yaml(self, body: bytes) -> None:
        """As the hub: the header has to be YAML, and these entries have to make sense."""
        import yaml

        header = json.loads(body)["content"].split("---")[1]
        metadata = yaml.safe_load(header)
        errors = []
        if not isinstance(metadata.get("license"), str):
            errors.append({"message": '"license" must be a string'})
        if metadata.get("base_model_relation") not in (None, "adapter", "finetune"):
            errors.append({"message": '"base_model_relation" is not known'})
        if "/" in metadata.get("base_model", "a/b").strip("/").replace("/", "", 1):
            errors.append({"message": '"base_model" must be a model id'})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, name: str, branch: str) -> None:
        if (repo := self.find(name, write=True)) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".npz", ".gguf", ".png"))
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
            )
        assert branch in repo.branches
        self.answer({"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self.find(name, write=True) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                href = f"{self.server.endpoint}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400)
        self.server.objects[oid] = body
        self.answer({})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        if (repo := self.find(name, write=True)) is None:
            return
        files = dict(repo.branches[branch])
        title = ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        repo.branches[branch] = files
        repo.messages.append((branch, title))
        url = f"{self.server.endpoint}/{name}/commit/{self.sha(repo, branch)}"
        self.answer({"commitUrl": url, "commitOid": self.sha(repo, branch)})

    # ------------------------------------------------------------------ download

    def files_at(self, repo: Repo, revision: str) -> dict[str, bytes] | None:
        for branch, files in repo.branches.items():
            if revision in (branch, self.sha(repo, branch)):
                return files
        self.error(404)
        return None

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if (repo := self.find(name)) and (files := self.files_at(repo, revision)) is not None:
            self.answer(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for path, data in files.items()
                ]
            )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repo := self.find(name)) is None:
            return
        if (files := self.files_at(repo, revision)) is None:
            return
        if path not in files:
            return self.answer({"error": "no entry"}, 404, {"X-Error-Code": "EntryNotFound"})
        branch = next(b for b, found in repo.branches.items() if found is files)
        headers = {
            "X-Repo-Commit": self.sha(repo, branch),
            "Accept-Ranges": "bytes",
            "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"',
        }
        self.answer(files[path], headers=headers)
