"""The loopback Hub before the real client: what is pushed is what is loaded, and refusals are those of the Hub."""

import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import GITATTRIBUTES, LoopbackHub

CARD = b"---\nlicense: mit\ntags: [a, b]\nlibrary_name: diffusers\n---\n# A model\n"
FILES = {
    "README.md": CARD,
    "unet/config.json": b"{}",
    "unet/weights.safetensors": bytes(range(256)) * 8,
    "void.bin": b"",
}


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, hub.in_process(tmp_path / "home"):
        hub.add_user("ada", "hf_ada", orgs=["acme"])
        hub.add_user("ada", "hf_reads", role="read")
        hub.add_user("bob", "hf_bob")
        yield hub


@pytest.fixture
def ada(hub):
    return hub.client("hf_ada")


@pytest.fixture
def folder(tmp_path):
    for path, data in FILES.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_bytes(data)
    return tmp_path / "model"


@pytest.fixture
def no_waits(monkeypatch):
    """The client's waits before it tries again."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def status(failure):
    return failure.value.response.status_code


@pytest.mark.parametrize("name", ["model", "ada/model", "acme/model"])
def test_a_folder_is_one_commit_with_both_kinds_of_upload(hub, ada, folder, name):
    id = ada.create_repo(name).repo_id
    assert id == (name if "/" in name else "ada/model")
    done = ada.upload_folder(repo_id=id, folder_path=folder, commit_message="First", commit_description="More")
    assert hub.files(id) == FILES | {".gitattributes": GITATTRIBUTES}
    newest, oldest = hub.commits(id)
    assert (newest.sha, newest.title, newest.message, newest.author) == (done.oid, "First", "More", "ada")
    assert newest.parents == (oldest.sha,)
    assert [newest.files[path].lfs for path in sorted(FILES)] == [False, False, True, False]
    assert (
        len(hub.asked("PUT", "/lfs/")) == len(hub.asked("POST", "/verify")) == len(hub.asked("POST", "/commit/")) == 1
    )
    assert [c.commit_id for c in ada.list_repo_commits(id)] == [newest.sha, oldest.sha]
    assert sorted(ada.list_repo_files(id)) == sorted([*FILES, ".gitattributes"])


def test_what_is_there_is_not_pushed_again(hub, ada, folder):
    ada.create_repo("ada/model")
    first = ada.upload_folder(repo_id="ada/model", folder_path=folder)
    again = ada.upload_folder(repo_id="ada/model", folder_path=folder)
    assert again.oid == first.oid
    assert len(hub.asked("POST", "/commit/")) == 1
    (folder / "copy.safetensors").write_bytes(FILES["unet/weights.safetensors"])
    (folder / "unet/config.json").write_bytes(b"{ }")
    ada.upload_folder(repo_id="ada/model", folder_path=folder)
    assert len(hub.asked("PUT")) == 1, "the content was there under another name"
    assert hub.files("ada/model")["copy.safetensors"] == FILES["unet/weights.safetensors"]


def test_files_are_deleted_and_copied(hub, ada, folder):
    hub.add_repo("ada/model", FILES | {"old/a.json": b"1", "old/b.json": b"2", "c.json": b"3"})
    ada.upload_folder(repo_id="ada/model", folder_path=folder, delete_patterns="c.*")
    assert set(hub.files("ada/model")) == {*FILES, "old/a.json", "old/b.json"}
    copies = [CommitOperationCopy(path, f"new/{path}") for path in FILES if path != "void.bin"]
    ada.create_commit("ada/model", [CommitOperationDelete("old/"), *copies], commit_message="Move")
    assert hub.files("ada/model") == FILES | {f"new/{path}": FILES[path] for path in FILES if path != "void.bin"}
    with pytest.raises(EntryNotFoundError):
        ada.delete_file("absent.json", "ada/model")


def test_a_commit_is_all_or_nothing(hub, ada):
    hub.add_repo("ada/model", FILES)
    before = hub.commits("ada/model")
    lost = CommitOperationAdd("lost.safetensors", b"never uploaded")
    lost._upload_mode, lost._is_uploaded, lost._should_ignore = "lfs", True, False
    operations = [CommitOperationAdd("new.json", b"{}"), CommitOperationDelete("README.md")]
    with pytest.raises(BadRequestError, match="lost.safetensors"):
        ada.create_commit("ada/model", [*operations, lost], commit_message="Half")
    with pytest.raises(EntryNotFoundError):
        ada.create_commit("ada/model", [*operations, CommitOperationDelete("absent")], commit_message="Half")
    hub.change("ada/model", {"void.bin": None, "theirs.json": b"{}"})
    with pytest.raises(HfHubHTTPError) as failure:
        ada.create_commit("ada/model", operations, commit_message="Late", parent_commit=before[0].sha)
    assert status(failure) == 412
    assert hub.commits("ada/model")[1:] == before
    assert set(hub.files("ada/model")) == {*FILES, "theirs.json"} - {"void.bin"}


def test_repositories_are_created_once(hub, ada):
    ada.create_repo("ada/model", private=True)
    assert hub.repos["ada/model"].private
    assert ada.create_repo("ada/model", exist_ok=True).repo_id == "ada/model"
    with pytest.raises(HfHubHTTPError) as failure:
        ada.create_repo("ada/model")
    assert status(failure) == 409
    ada.delete_repo("ada/model")
    assert not ada.repo_exists("ada/model")


def test_spaces(hub, ada, folder, tmp_path):
    ada.create_repo("ada/model")
    assert ada.create_repo("ada/model", repo_type="space", space_sdk="gradio", private=True).repo_id == "ada/model"
    for settings in ({}, {"space_sdk": "perl"}):
        with pytest.raises((ValueError, HfHubHTTPError), match="(?i)sdk"):
            ada.create_repo("ada/other", repo_type="space", **settings)
    new = hub.files("spaces/ada/model")["README.md"].decode()
    assert new.startswith("---\ntitle: model\n")
    assert new.endswith(
        "Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference\n"
    )
    info = ada.space_info("ada/model")
    assert (info.id, info.author, info.sdk, info.private) == ("ada/model", "ada", "gradio", True)
    ada.upload_folder(repo_id="ada/model", repo_type="space", folder_path=folder / "unet")
    assert {"weights.safetensors", "config.json", "README.md"} < hub.files("spaces/ada/model").keys()
    assert hub.files("ada/model").keys() == {".gitattributes"}
    found = Path(ada.snapshot_download("ada/model", repo_type="space", cache_dir=tmp_path / "cache"))
    assert (found / "weights.safetensors").read_bytes() == FILES["unet/weights.safetensors"]
    with pytest.raises(ValueError, match='"sdk" must be one of'):
        ada.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id="ada/model", repo_type="space")
    with pytest.raises(RepositoryNotFoundError):
        hub.client("hf_bob").space_info("ada/model")
    ada.delete_repo("ada/model", repo_type="space")
    assert list(hub.repos) == ["ada/model"]


def test_a_private_repository_is_its_owner_s(hub, ada):
    hub.add_repo("ada/model", FILES, private=True)
    assert ada.model_info("ada/model").private
    assert hub.client("hf_reads").model_info("ada/model").private
    for token in (None, "hf_bob"):
        client = hub.client(token)
        for call in (client.model_info, client.list_repo_files, client.snapshot_download):
            with pytest.raises(RepositoryNotFoundError):
                call("ada/model")
        with pytest.raises(RepositoryNotFoundError):
            client.hf_hub_download("ada/model", "README.md")
    assert {(ask.authorization, ask.token) for ask in hub.requests} == {
        (True, "ada-write"),
        (True, "ada-read"),
        (True, "bob-write"),
        (False, None),
    }


def test_tokens(hub, ada):
    hub.add_repo("ada/model", FILES)
    assert ada.whoami()["name"] == "ada"
    assert [org["name"] for org in ada.whoami()["orgs"]] == ["acme"]
    assert hub.client("hf_reads").whoami()["auth"]["accessToken"]["role"] == "read"
    wrong = hub.client("hf_wrong")
    for call in (wrong.whoami, lambda: wrong.model_info("ada/model"), lambda: wrong.create_repo("ada/other")):
        with pytest.raises(OSError, match=r"401|Invalid user token") as failure:  # 0.36 lets out errors of requests too
            call()
        assert status(failure) == 401
        assert not isinstance(failure.value, RepositoryNotFoundError)
    assert hub.requests[-1].token == "invalid"
    for token in ("hf_reads", "hf_bob"):
        client = hub.client(token)
        for call in (lambda c: c.create_repo("ada/other"), lambda c: c.create_branch("ada/model", branch="b"), push):
            with pytest.raises(HfHubHTTPError) as failure:
                call(client)
            assert status(failure) == 403
    with pytest.raises(RepositoryNotFoundError):
        push(hub.client())
    assert hub.files("ada/model") == FILES
    assert list(hub.repos) == ["ada/model"]


def push(client, data=b"new", **more):
    return client.upload_file(path_or_fileobj=data, path_in_repo="new.bin", repo_id="ada/model", **more)


def test_what_is_not_there(hub, ada, tmp_path):
    hub.add_repo("ada/model", FILES)
    with pytest.raises(RepositoryNotFoundError):
        ada.model_info("ada/absent")
    with pytest.raises(RepositoryNotFoundError):
        ada.snapshot_download("absent")
    for call in (lambda: ada.model_info("ada/model", revision="no"), lambda: push(ada, revision="no")):
        with pytest.raises(RevisionNotFoundError):
            call()
    for name in ("absent.json", "unet"):
        with pytest.raises(EntryNotFoundError):
            ada.hf_hub_download("ada/model", name, cache_dir=tmp_path)
    assert not ada.file_exists("ada/model", "absent.json")
    with pytest.raises(EntryNotFoundError):
        list(ada.list_repo_tree("ada/model", "absent"))


def test_branches_tags_and_pull_requests(hub, ada, tmp_path):
    first = hub.add_repo("ada/model", FILES).sha
    ada.create_branch("ada/model", branch="try/one")
    push(ada, revision="try/one")
    ada.create_tag("ada/model", tag="v1.0", revision="try/one")
    with pytest.raises(HfHubHTTPError) as failure:
        ada.create_branch("ada/model", branch="try/one")
    assert status(failure) == 409
    ada.create_branch("ada/model", branch="try/one", exist_ok=True)
    offered = push(hub.client("hf_bob"), b"offer", create_pr=True)
    assert (offered.pr_num, offered.pr_revision) == (1, "refs/pr/1")
    push(ada, b"second", revision="refs/pr/1")
    assert push(ada, create_pr=True).pr_num == 2
    assert hub.files("ada/model") == FILES
    assert hub.repos["ada/model"].branches["main"] == first
    found = {"main": None, first: None, "try/one": b"new", "v1.0": b"new", "refs/pr/1": b"second", "refs/pr/2": b"new"}
    for revision, data in found.items():
        assert hub.files("ada/model", revision).get("new.bin") == data
        assert ada.file_exists("ada/model", "new.bin", revision=revision) == (data is not None)
        if data:
            path = ada.hf_hub_download("ada/model", "new.bin", revision=revision, cache_dir=tmp_path)
            assert Path(path).read_bytes() == data
    refs = ada.list_repo_refs("ada/model", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "try/one"]
    assert ([ref.name for ref in refs.tags], len(refs.pull_requests)) == (["v1.0"], 2)
    ada.delete_branch("ada/model", branch="try/one")
    with pytest.raises(RevisionNotFoundError):
        ada.model_info("ada/model", revision="try/one")


def test_a_snapshot_is_what_was_pushed(hub, tmp_path):
    old = hub.add_repo("ada/model", FILES).sha
    hub.change("ada/model", {"unet/config.json": b"{1}", "README.md": None})
    client = hub.client()
    for revision, files in (("main", hub.files("ada/model")), (old, FILES)):
        found = tmp_path / client.snapshot_download("ada/model", revision=revision, cache_dir=tmp_path / "cache")
        assert {str(path.relative_to(found)): path.read_bytes() for path in found.rglob("*.*")} == files
    count = len(hub.asked("GET", "/resolve/"))
    client.snapshot_download("ada/model", cache_dir=tmp_path / "cache")
    assert len(hub.asked("GET", "/resolve/")) == count
    hub.close()
    assert client.snapshot_download("ada/model", cache_dir=tmp_path / "cache") != found
    with pytest.raises(LocalEntryNotFoundError):
        client.snapshot_download("ada/model", cache_dir=tmp_path / "other")


def test_information(hub):
    hub.add_repo("ada/model", FILES)
    client = hub.client()
    info = client.model_info("ada/model", files_metadata=True)
    assert (info.id, info.sha, info.private) == ("ada/model", hub.commits("ada/model")[0].sha, False)
    assert (info.library_name, info.card_data.license, info.tags) == ("diffusers", "mit", ["a", "b", "diffusers"])
    sizes = {file.rfilename: (file.size, bool(file.lfs)) for file in info.siblings}
    assert sizes == {path: (len(data), "weights" in path) for path, data in FILES.items()}
    top = [entry.path for entry in client.list_repo_tree("ada/model")]
    assert top == ["README.md", "unet", "void.bin"]
    assert [e.path for e in client.list_repo_tree("ada/model", "unet")] == sorted(p for p in FILES if "/" in p)
    paths = client.get_paths_info("ada/model", ["unet", "unet/weights.safetensors", "absent"])
    assert [type(path).__name__ for path in paths] == ["RepoFolder", "RepoFile"]
    assert paths[1].lfs.size == 2048


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("license: [", "YAML metadata is invalid"),
        ("- a", "must be a mapping"),
        ("tags: [1]", '"tags" must be'),
        ("library_name: [a]", '"library_name" must be'),
        ("model-index: [{results: [{metrics: [{type: fid}]}]}]", "dataset.name.*metrics.*value.*0..name"),
        ("model-index: fid", '"model-index" must be'),
        ("value: !!python/name:numpy.float64", "YAML metadata is invalid"),
    ],
)
def test_a_card_that_is_not_valid_is_not_pushed(hub, ada, text, message):
    hub.add_repo("ada/model")
    with pytest.raises(ValueError, match=r"(?s)Invalid metadata in README.md.*" + message):
        ada.upload_file(path_or_fileobj=f"---\n{text}\n---\n".encode(), path_in_repo="README.md", repo_id="ada/model")
    assert not hub.files("ada/model")


def test_a_cut_upload_leaves_the_branch_as_it_was(hub, ada, folder, no_waits):
    ada.create_repo("ada/model")
    hub.fail_next("PUT", "/lfs/", cut="asking", times=6)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        ada.upload_folder(repo_id="ada/model", folder_path=folder)
    assert len(no_waits) == 5
    hub.fail_next("PUT", "/lfs/", status=507)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        ada.upload_folder(repo_id="ada/model", folder_path=folder)
    assert len(no_waits) == 5
    assert not hub.asked("POST", "/commit/")
    assert set(hub.files("ada/model")) == {".gitattributes"}
    hub.fail_next("PUT", "/lfs/", cut="asking")
    ada.upload_folder(repo_id="ada/model", folder_path=folder)
    assert [ask.status for ask in hub.asked("PUT")] == [None] * 6 + [507, None, 200]
    assert hub.files("ada/model") == FILES | {".gitattributes": GITATTRIBUTES}


@pytest.mark.parametrize(("cut", "commits"), [("asking", 1), ("answering", 2)])
def test_a_cut_commit_is_done_or_not(hub, ada, cut, commits):
    hub.add_repo("ada/model", FILES)
    seen = []
    hub.fail_next("POST", "/commit/", cut=cut, call=lambda: seen.append(len(hub.commits("ada/model"))))
    with pytest.raises(Exception, match=r"(?i)connect|clos|reset|complete|broken"):
        push(ada)
    assert len(hub.commits("ada/model")) == commits
    assert seen == [1] * (commits - 1)
    push(ada)
    assert len(hub.commits("ada/model")) == 2
    assert hub.files("ada/model") == FILES | {"new.bin": b"new"}


def test_a_cut_download_is_resumed(hub, no_waits, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    hub.add_repo("ada/model", FILES)
    hub.fail_next("GET", "/resolve/", cut="answering")
    load = partial(hub.client().hf_hub_download, "ada/model", "unet/weights.safetensors", cache_dir=tmp_path)
    try:
        path = load()
    except OSError:  # 0.36 leaves it to the next call
        path = load()
    assert Path(path).read_bytes() == FILES["unet/weights.safetensors"]
    assert [ask.status for ask in hub.asked("GET", "/resolve/")] == [None, 206]


def test_who_is_killed_while_asking_has_done_nothing(hub):
    hub.add_repo("ada/model", FILES)
    address = urlsplit(hub.url)
    for headers, sent in (("Content-Length: 999", b"{"), ("Transfer-Encoding: chunked", b"9\r\n123456789\r\n")):
        with socket.create_connection((address.hostname, address.port)) as connection:
            start = "POST /api/models/ada/model/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_ada\r\n"
            connection.sendall(f"{start}{headers}\r\n\r\n".encode() + sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    hub.wait()
    assert [ask.status for ask in hub.asked("POST", "/commit/")] == [None, None]
    assert len(hub.commits("ada/model")) == 1


@pytest.mark.parametrize(("status", "commits"), [(500, 1), (None, 2)])
def test_a_commit_by_who_is_killed_then(hub, tmp_path, status, commits):
    hub.add_repo("ada/model", FILES)
    code = (
        "from huggingface_hub import HfApi as A; A().upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id='{}')"
    )
    hub.fail_next("POST", "/commit/", status=status, call=lambda: child.kill())
    command = [sys.executable, "-c", code.format("ada/model")]
    with subprocess.Popen(command, env=hub.environment(tmp_path, "hf_ada")) as child:
        assert child.wait(60) == -signal.SIGKILL
    hub.wait()
    assert len(hub.commits("ada/model")) == commits


def test_the_hub_s_own_mistakes_are_not_silent(capfd):
    hub = LoopbackHub()
    hub.answer("POST", "/api/validate-yaml", {}, b"{}")
    with pytest.raises(KeyError), hub:
        pass
    assert capfd.readouterr() == ("", "")


def test_the_environment_of_a_child(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("https_proxy", "http://example.org")
    environment = hub.environment(tmp_path, "hf_ada")
    assert {name for name in environment if name.lower().endswith("_proxy")} == {"NO_PROXY"}
    assert (environment["HF_ENDPOINT"], environment["HF_TOKEN"]) == (hub.url, "hf_ada")
    assert "HF_TOKEN" not in hub.environment(tmp_path)
