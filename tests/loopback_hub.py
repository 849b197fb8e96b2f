"""A Hugging Face Hub on this machine: the real client pushes to it and loads from it, over HTTP.

    with LoopbackHub() as hub:
        hub.add_user("ada", "hf_ada")
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path, "hf_ada"))
        hub.files("ada/model")

It keeps everything in memory and says nothing on the terminal. A Space has the id "spaces/ada/model" here, and no
hardware that runs it. There are no data sets, and no xet: large files go by LFS. Refusals carry the statuses, codes and
messages of huggingface.co; where its client tells them apart by "https://", which this server does not speak, the error
code stands in.

The client tries again, with growing waits of 1, 2, 4, 8, 8 s, what ends in 500, 502, 503, 504 (version 2 also 408 and
429) or in a broken connection: always an LFS upload, never a commit. A fault that should end an upload at once has
another status, such as 507.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

DATE = "2020-10-06T00:00:00.000Z"
GITATTRIBUTES = b"".join(b"*.%s filter=lfs diff=lfs merge=lfs -text\n" % kind for kind in (b"safetensors", b"bin"))
TYPES = {"model": "", "space": "spaces/"}  # the beginning of ids
SDKS = ("gradio", "docker", "static")
NEW_SPACE = """---
title: {name}
emoji: 🐢
colorFrom: indigo
colorTo: gray
sdk: {sdk}
sdk_version: 6.0.0
app_file: app.py
pinned: false
---

Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference
"""
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc0-1.0", "openrail", "other")  # some of those that the Hub knows
ROUTES = []


def upload_mode(path, size):
    """How a new file is to be uploaded: weights, pictures and all that is large by LFS, the rest within the commit."""
    large = path.endswith((".safetensors", ".bin", ".png")) or size > 1_000_000
    return "lfs" if large and size else "regular"


def card_data(text):
    """The metadata at the top of a card. Raises ValueError if it is no mapping in YAML."""
    found = re.match(r"\ufeff?---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata is invalid: {' '.join(str(error).split())}") from None
    if not isinstance(data or {}, dict):
        raise ValueError("YAML metadata must be a mapping")
    return data or {}


def card_errors(data, type="model"):
    """What is wrong with a card's metadata."""
    if type == "space" and data.get("sdk") not in SDKS:
        yield f'"sdk" must be one of [{", ".join(SDKS)}]'
    for key in ("sdk_version", "python_version") if type == "space" else ():
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("pipeline_tag", "library_name"):
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("license", "tags", "datasets", "base_model", "language", "metrics"):
        value = data.get(key, [])
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            yield f'"{key}" must be a string or an array of strings'
    if isinstance(data.get("license"), str) and data["license"] not in LICENSES:
        yield f'"license" must be one of [{", ".join(LICENSES)}]'
    for i, model in enumerate(data.get("model-index", [])):
        for j, result in enumerate(model.get("results", [])):
            at = f"model-index[{i}].results[{j}]"
            for key in ("task.type", "dataset.type", "dataset.name"):
                outer, inner = key.split(".")
                if not isinstance(result.get(outer, {}).get(inner), str):
                    yield f'"{at}.{key}" is required'
            for k, metric in enumerate(result.get("metrics") or [{}]):
                for key in {"type", "value"} - set(metric):
                    yield f'"{at}.metrics[{k}].{key}" is required'
        if not isinstance(model.get("name"), str):
            yield f'"model-index[{i}].name" is required'


class File:
    """The bytes of a file, whether they are kept by LFS, and their names in git and LFS."""

    def __init__(self, data, lfs=False):
        self.data, self.lfs, self.sha256 = data, lfs, hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        content = pointer if lfs else data
        self.blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.oid = self.sha256 if lfs else self.blob
        self.large = {"sha256": self.sha256, "size": len(data), "pointerSize": len(pointer)} if lfs else None

    def entry(self, path):
        """The file in a listing of a tree."""
        large = {"lfs": self.large | {"oid": self.sha256}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.blob} | large


class Commit(NamedTuple):
    """A state of a repository, never changed: `files` by path, `parents` by sha."""

    sha: str
    title: str
    message: str
    author: str
    parents: tuple
    files: dict


class Token(NamedTuple):
    """A user's token; `name` is how the log of requests calls it."""

    user: str
    role: str
    orgs: tuple

    @property
    def name(self):
        return f"{self.user}-{self.role}"

    def owns(self, repo):
        return repo.removeprefix("spaces/").split("/")[0] in (self.user, *self.orgs)


@dataclass
class Repo:
    """A repository: commits by sha, branches and pull requests ("refs/pr/1") by name, uploaded LFS files by sha256."""

    id: str
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    uploads: dict = field(default_factory=dict)

    def at(self, revision):
        """The commit a branch, a tag, a pull request or a full sha stands for."""
        name = revision.removeprefix("refs/heads/")
        sha = self.branches.get(name) or self.tags.get(name) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add(self, branch, files, title, message="", author="", parents=()):
        """Make a commit and move a branch to it."""
        tree = sorted((path, file.blob) for path, file in files.items())
        text = json.dumps([self.id, tree, title, message, author, parents, len(self.commits)])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, message, author, tuple(parents), files)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit


@dataclass
class Request:
    """A request as logged: `token` is a token's name, "invalid", or None; `status` None if it was never answered."""

    method: str
    path: str
    authorization: bool
    token: str | None
    status: int | None = None
    done: bool = False


@dataclass
class Ask:
    """What a route is asked."""

    method: str
    headers: object
    query: dict
    body: bytes
    token: Token | None

    def json(self):
        return json.loads(self.body or b"{}")


class Answer(NamedTuple):
    """What a route answers, if it is not simply JSON."""

    status: int
    body: bytes = b""
    headers: dict = {}  # noqa: RUF012


class Refusal(Exception):
    """An answer that is an error; `code` is the Hub's X-Error-Code."""

    def __init__(self, status, message, code=None, **more):
        super().__init__(message)
        headers = {"X-Error-Message": message.replace("\n", " "), "Content-Type": "application/json"}
        headers |= {"X-Error-Code": code} if code else {}
        self.answer = Answer(status, json.dumps({"error": message} | more).encode(), headers)


class LoopbackHub:
    """A Hub at `url`. `mode(path, size)` says how a new file is uploaded: "lfs" or "regular"."""

    def __init__(self, mode=upload_mode):
        self.mode, self.repos, self.tokens, self.requests = mode, {}, {}, []
        self.lock, self._faults, self._hrefs, self._errors, self._open = threading.RLock(), [], {}, [], set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub, self._server.handle_error = self, lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close()
        if self._errors and kind is None:
            raise self._errors[0]

    def close(self):
        """Be gone: no connection is answered any more, not even an open one."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add_user(self, name, token, role="write", orgs=()):
        """A user's token, to read or to write; a user may have several. The user's organisations are `orgs`."""
        self.tokens[token] = Token(name, role, tuple(orgs))

    def add_repo(self, id, files=None, private=False):
        """A repository with `files`, bytes by path, in its first commit."""
        repo = self.repos[id] = Repo(id, private)
        return repo.add(
            "main", self._filed({}, files or {}), "initial commit", author=id.removeprefix("spaces/").split("/")[0]
        )

    def change(self, id, files, revision="main", title="A change"):
        """A commit by somebody else: bytes by path, None for a file to delete."""
        before = self.repos[id].at(revision)
        with self.lock:
            return self.repos[id].add(revision, self._filed(before.files, files), title, parents=(before.sha,))

    def _filed(self, before, files):
        new = {k: File(v, self.mode(k, len(v)) == "lfs") for k, v in files.items() if v is not None}
        return {path: file for path, file in (before | new).items() if files.get(path, b"") is not None}

    def files(self, id, revision="main"):
        """The files of a revision: bytes by path."""
        return {path: file.data for path, file in self.repos[id].at(revision).files.items()}

    def commits(self, id, revision="main"):
        """The commits of a revision, newest first."""
        found = [self.repos[id].at(revision)]
        while found[-1].parents:
            found.append(self.repos[id].commits[found[-1].parents[0]])
        return found

    def asked(self, method, part=""):
        """The requests so far with this method and `part` in their path."""
        return [ask for ask in self.requests if ask.method == method and part in ask.path]

    def wait(self):
        """Until no request is being answered: one may outlive who asked."""
        while not all(request.done for request in self.requests):
            time.sleep(0.002)

    def fail_next(self, method, part="", status=None, cut=None, call=None, times=1):
        """Let the next `times` requests with this method and `part` in their path fail.

        `status` answers so, and nothing is done. `cut="asking"` breaks the connection when half of what is sent has
        been read, and nothing is done; `cut="answering"` breaks it in the middle of the answer's body, and everything
        is done. `call` is called once the request has been read and before anything is done: to kill who asks, say;
        what was asked is done all the same, unless there is a `status` too.
        """
        with self.lock:
            fault = {"method": method, "part": part, "status": status, "cut": cut, "call": call}
            self._faults += [SimpleNamespace(**fault)] * times

    def next_fault(self, request):
        """Log a request, and take what was ordered for it."""
        with self.lock:
            self.requests.append(request)
            for i, fault in enumerate(self._faults):
                if fault.method == request.method and fault.part in request.path:
                    return self._faults.pop(i)
        return SimpleNamespace(status=None, cut=None, call=None)

    def environment(self, home, token=None):
        """A whole environment for a process whose Hub is this one, and whose cache and login are in `home`."""
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_CACHE|DIFFUSERS_|.*_proxy$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        return kept | ours | dict.fromkeys(switches, "1") | ({"HF_TOKEN": token} if token else {})

    @contextlib.contextmanager
    def in_process(self, home, token=None):
        """The same for this process, whose client read its settings long ago."""
        from huggingface_hub import constants, file_download, hf_api

        settings = {"ENDPOINT": self.url, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        settings |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
        template = {"HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}"}
        tokens = {"HF_TOKEN": token or "", "HUGGING_FACE_HUB_TOKEN": "", "NO_PROXY": "127.0.0.1"}
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(constants, **settings, **template))
            stack.enter_context(mock.patch.multiple(file_download, create=True, **template))
            stack.enter_context(mock.patch.object(hf_api.api, "endpoint", self.url))
            stack.enter_context(mock.patch.dict(os.environ, tokens))
            yield self

    def client(self, token=None):
        """A client of this Hub, or one without a token. What uploads needs `in_process` around it."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.url, token=token or False)

    def find(self, id, ask, needs):
        """A repository that the asker may "read", "offer" changes to, or "write"."""
        repo, token = self.repos.get(id), ask.token
        if token is None and (repo is None or repo.private or needs != "read"):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not token.owns(id)):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if needs != "read" and token.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if needs == "write" and not token.owns(id) and "create_pr" not in ask.query:
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def token_of(self, headers):
        """The token of a request, or None; one that nobody has is refused."""
        secret = headers.get("Authorization", "").removeprefix("Bearer ")
        if secret and secret not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(secret)

    def answer(self, method, target, headers, body):
        """Find the route of a request, and its answer."""
        try:
            token, url = self.token_of(headers), urlsplit(target)
            ask = Ask(method, headers, parse_qs(url.query), body, token)
            for methods, pattern, needs, function in ROUTES:
                if method in methods and (found := pattern.fullmatch(url.path)):
                    names = {name: unquote(value) for name, value in found.groupdict().items()}
                    prefix = "spaces/" if names.pop("type", "models") == "spaces" else ""
                    with self.lock:
                        if "repo" in names:
                            names["repo"] = self.find(prefix + names["repo"], ask, needs)
                        result = function(self, ask, **names)
                    return result if isinstance(result, Answer) else as_json(200, result)
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            return refusal.answer
        except Exception as error:  # a mistake of this file, or of who speaks to it: `__exit__` raises it
            self._errors.append(error)
            return Refusal(501, repr(error)).answer


class Handler(BaseHTTPRequestHandler):
    """Reads requests and sends answers, with the faults that were ordered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.server.hub._open.add(self.connection)

    def finish(self):
        self.server.hub._open.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_):
        pass

    def read(self, half=False):
        """The body of a request, or only half of it; None if who asks is gone before its end."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            size = int(self.headers.get("Content-Length", 0)) // (2 if half else 1)
            body = self.rfile.read(size)
            return body if len(body) == size else None
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self.rfile.read(size))
            if half or not self.rfile.readline():
                return None
        return b"".join(chunks) if self.rfile.readline() else None

    def cut(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle_request(self):
        hub, secret = self.server.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        token = hub.tokens[secret].name if secret in hub.tokens else "invalid" if secret else None
        log = Request(self.command, self.path, bool(secret), token)
        fault = hub.next_fault(log)
        try:
            self.reply(hub, log, fault)
        finally:
            log.done = True

    def reply(self, hub, log, fault):
        body = self.read(half=fault.cut == "asking")
        if fault.cut == "asking" or body is None:
            return self.cut()
        if fault.call:
            fault.call()
        ordered = fault.status and Refusal(fault.status, "This was ordered").answer
        answer = ordered or hub.answer(self.command, self.path, self.headers, body)
        log.status = None if fault.cut else answer.status
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if fault.cut else answer.body)
        return self.cut() if fault.cut else None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request


def as_json(status, data):
    """An answer in JSON."""
    return Answer(status, json.dumps(data, default=str).encode(), {"Content-Type": "application/json"})


def route(methods, path, needs="read"):
    """Answer requests to `path` by the function; where it names a {repo}, to those who may do what it `needs`.

    A path of models is one of Spaces too.
    """
    expression = path.replace("/api/models/", "/api/(?P<type>models|spaces)/").replace("{path}", r"(?P<path>.+)")
    expression = expression.replace("{repo}", r"(?P<repo>(?:spaces/)?[^/]+(?:/[^/]+)?)")
    expression = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", expression)

    def add(function):
        ROUTES.append((methods.split(), re.compile(expression), needs, function))
        return function

    return add


@route("GET", "/api/whoami-v2")
def whoami(hub, ask):
    if ask.token is None:
        raise Refusal(401, "Invalid username or password.")
    user, role, orgs = ask.token
    access = {"type": "access_token", "accessToken": {"displayName": ask.token.name, "role": role, "createdAt": DATE}}
    orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in orgs]
    return {"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": access}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, ask):
    errors, data = [], {}
    try:
        data = card_data(ask.json()["content"])
        errors += card_errors(data, ask.json().get("repoType", "model"))
    except ValueError as error:
        errors.append(str(error))
    except (AttributeError, TypeError):  # a text where a list of mappings should be
        errors.append('"model-index" must be an array of objects')
    warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
    found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return as_json(400 if errors else 200, found)


@route("POST DELETE", "/api/repos/(?P<what>create|delete)")
def create_or_delete(hub, ask, what):
    data = ask.json()
    if ask.token is None:
        raise Refusal(401, "Invalid username or password.")
    type, files = data.get("type", "model"), {".gitattributes": GITATTRIBUTES}
    if type not in TYPES:
        raise Refusal(400, f"This Hub has no {type}")
    owner = data.get("organization") or ask.token.user
    id = f"{TYPES[type]}{owner}/{data['name']}"
    if ask.token.role != "write" or not ask.token.owns(id):
        raise Refusal(403, f'You don\'t have the rights to {what} a {type} under the namespace "{owner}"')
    if what == "delete":
        del hub.repos[hub.find(id, ask, "write").id]
        return {}
    if id in hub.repos:
        raise Refusal(409, f"You already created this {type} repo", url=f"{hub.url}/{id}")
    if type == "space":
        if data.get("sdk") not in SDKS:
            raise Refusal(400, f'"sdk" must be one of [{", ".join(SDKS)}]')
        files["README.md"] = NEW_SPACE.format(**data).encode()
    hub.add_repo(id, files, data.get("private") or data.get("visibility") == "private")
    name = id.removeprefix(TYPES[type])
    return {"url": f"{hub.url}/{id}", "name": name, "id": name}


@route("GET", "/api/models/{repo}/auth-check")
@route("GET", "/api/models/{repo}/auth-check/write", needs="write")
def auth_check(hub, ask, repo):
    return {}


@route("POST DELETE", "/api/models/{repo}/(?P<kind>branch|tag)/{rev}", needs="write")
def branch_or_tag(hub, ask, repo, kind, rev):
    names = repo.branches if kind == "branch" else repo.tags
    data = ask.json()
    name, start = (rev, data.get("startingPoint", "main")) if kind == "branch" else (data.get("tag", rev), rev)
    if ask.method == "DELETE":
        if not names.pop(rev, None):
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    elif name in names:
        raise Refusal(409, f'Reference already exists: "{name}"')
    else:
        names[name] = repo.at(start).sha
    return {}


@route("GET", "/api/models/{repo}/refs")
def refs(hub, ask, repo):
    def listed(names, prefix=""):
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in names.items()]

    pulls = {name: sha for name, sha in repo.branches.items() if name.startswith("refs/pr/")}
    branches = {name: sha for name, sha in repo.branches.items() if name not in pulls}
    found = {"branches": listed(branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    return found | {"pullRequests": listed(pulls)}


@route("GET", "/api/models/{repo}/commits/{rev}")
def history(hub, ask, repo, rev):
    def told(commit):
        of = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": DATE}
        return of | {"authors": [{"user": commit.author}]}

    return [told(commit) for commit in hub.commits(repo.id, rev)]


@route("GET", "/api/models/{repo}")
@route("GET", "/api/models/{repo}/revision/{rev}")
def info(hub, ask, repo, rev="main"):
    commit = repo.at(rev)
    try:
        card = card_data(commit.files["README.md"].data.decode())
    except (KeyError, ValueError):
        card = {}
    known = {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    tags = [*(card.get("tags") or []), *(card[key] for key in ("library_name", "pipeline_tag") if key in card)]

    def sibling(path, file):
        blob = {"size": len(file.data), "blobId": file.blob} | ({"lfs": file.large} if file.lfs else {})
        return {"rfilename": path} | (blob if "blobs" in ask.query else {})

    id = repo.id.removeprefix("spaces/")
    found = {"id": id, "author": id.split("/")[0], "sha": commit.sha, "tags": tags}
    found |= {"sdk": card.get("sdk")} if id != repo.id else {"modelId": id}
    found |= {"lastModified": DATE, "createdAt": DATE, "private": repo.private, "gated": False, "disabled": False}
    found |= {"downloads": 0, "likes": 0, "cardData": card} | known
    return found | {"siblings": [sibling(path, file) for path, file in sorted(commit.files.items())]}


def entries(commit, folder=""):
    """All that lies in a folder of a commit, however deep: entries of a listing by path."""
    found = {}
    for path, file in sorted(commit.files.items()):
        if path.startswith(folder):
            for cut in (i for i, letter in enumerate(path) if letter == "/" and i > len(folder)):
                tree = hashlib.sha1(f"{commit.sha}/{path[:cut]}".encode()).hexdigest()
                found[path[:cut]] = {"type": "directory", "path": path[:cut], "oid": tree, "size": 0}
            found[path] = file.entry(path)
    return found


@route("GET", "/api/models/{repo}/tree/{rev}")
@route("GET", "/api/models/{repo}/tree/{rev}/{path}")
def tree(hub, ask, repo, rev, path=""):
    folder = path.strip("/") + "/" if path else ""
    found = entries(repo.at(rev), folder)
    if path and not found:
        raise Refusal(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
    deep = ask.query.get("recursive", [""])[0].lower() in ("true", "1")
    return [entry for name, entry in found.items() if deep or "/" not in name[len(folder) :]]


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(hub, ask, repo, rev):
    form = "form" in ask.headers.get("Content-Type", "")
    paths = parse_qs(ask.body.decode()).get("paths", []) if form else ask.json()["paths"]
    found = entries(repo.at(rev))
    return [found[path] for path in paths if path in found]


@route("POST", "/api/models/{repo}/preupload/{rev}", needs="write")
def preupload(hub, ask, repo, rev):
    """How each file is to be uploaded, and what is there now: a sha256 for an LFS file, a git blob for another."""
    files = repo.at(rev).files

    def told(path, size, **_):
        there = files.get(path)
        mode = "lfs" if there and there.lfs and size else hub.mode(path, size)
        oid = {"oid": there.oid} if there else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False} | oid

    return {"files": [told(**file) for file in ask.json()["files"]]}


@route("POST", "/{repo}.git/info/lfs/objects/batch", needs="offer")
def lfs_batch(hub, ask, repo):
    def told(oid, size):
        if oid in repo.uploads:
            return {"oid": oid, "size": size}
        key = secrets.token_hex(8)
        hub._hrefs[key] = repo, oid, size
        verify = {"href": f"{hub.url}/{repo.id}.git/info/lfs/objects/verify", "header": {}}
        actions = {"upload": {"href": f"{hub.url}/lfs/{key}/{oid}", "header": {}}, "verify": verify}
        return {"oid": oid, "size": size, "authenticated": True, "actions": actions}

    return {"transfer": "basic", "objects": [told(thing["oid"], thing["size"]) for thing in ask.json()["objects"]]}


@route("PUT", "/lfs/{key}/{oid}")
def lfs_put(hub, ask, key, oid):
    """The address itself is the permission, as that of a storage provider is."""
    repo, expected, size = hub._hrefs.get(key) or (None, None, None)
    if oid != expected:
        raise Refusal(403, "Access Denied")
    if (hashlib.sha256(ask.body).hexdigest(), len(ask.body)) != (oid, size):
        raise Refusal(400, "The content is not what was announced")
    repo.uploads[oid] = ask.body
    return Answer(200, b"", {"ETag": f'"{oid}"'})


@route("POST", "/{repo}.git/info/lfs/objects/verify", needs="offer")
def lfs_verify(hub, ask, repo):
    oid, size = ask.json()["oid"], ask.json()["size"]
    if len(repo.uploads.get(oid, b"")) != size:
        raise Refusal(404, f"No object {oid} of size {size}")
    return {}


def add_file(repo, files, value):
    files[value["path"]] = File(base64.b64decode(value["content"], validate=True))


def add_lfs_file(repo, files, value):
    there = {file.sha256: file.data for commit in repo.commits.values() for file in commit.files.values() if file.lfs}
    data = (there | repo.uploads).get(value["oid"])
    if data is None or value.get("size", len(data)) != len(data):
        raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
    files[value["path"]] = File(data, lfs=True)


def copy_file(repo, files, value):
    source = repo.at(value["srcRevision"]).files if value.get("srcRevision") else files
    if value["srcPath"] not in source:
        raise Refusal(404, f"{value['srcPath']} does not exist", "EntryNotFound")
    files[value["path"]] = source[value["srcPath"]]


def delete_file(repo, files, value):
    if not files.pop(value["path"], None):
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")


def delete_folder(repo, files, value):
    inside = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
    if not inside:
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    for path in inside:
        del files[path]


EDITS = {"file": add_file, "lfsFile": add_lfs_file, "copyFile": copy_file}
EDITS |= {"deletedFile": delete_file, "deletedFolder": delete_folder}


@route("POST", "/api/models/{repo}/commit/{rev}", needs="write")
def commit(hub, ask, repo, rev):
    """Edit a copy of the revision's files, line by line; a branch moves only when every line has been accepted."""
    (_, header), *edits = ((line["key"], line["value"]) for line in map(json.loads, ask.body.splitlines()))
    parent, new = repo.at(rev), "create_pr" in ask.query
    if not new and rev not in repo.branches:
        raise Refusal(400, f"{rev} is not a branch")
    if header.get("parentCommit", parent.sha) != parent.sha:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for key, value in edits:
        if {"", ".", ".."} & set(value["path"].removesuffix("/").split("/")):
            raise Refusal(400, f"Invalid path: {value['path']}")
        EDITS[key](repo, files, value)
    number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
    branch = f"refs/pr/{number}" if new else rev
    made = repo.add(branch, files, header["summary"], header.get("description", ""), ask.token.user, (parent.sha,))
    pull = {"pullRequestUrl": f"{hub.url}/{repo.id}/discussions/{number}"} if new else {}
    return {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.url}/{repo.id}/commit/{made.sha}"} | pull


@route("GET HEAD", "/{repo}/resolve/{rev}/{path}")
def resolve(hub, ask, repo, rev, path):
    commit = repo.at(rev)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if path not in commit.files:
        status, body, more = Refusal(404, "Entry not found", "EntryNotFound").answer
        return Answer(status, body, more | headers)
    file = commit.files[path]
    headers |= {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("Range", ""))
    if not asked:
        return Answer(200, file.data, headers)
    first, size = int(asked[1]), len(file.data)
    if first >= size:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
    part = file.data[first : int(asked[2]) + 1 if asked[2] else None]
    return Answer(206, part, headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{size}"})
