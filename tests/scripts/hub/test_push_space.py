"""Pushing a Space that shows a model, and running what was pushed as the Hub does."""

from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from page.space import push_space
from pushing import READS, REPO, TOKEN, card

import ddim_plugin
from ddim_plugin import cli

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SPACE = f"spaces/{REPO}"
PACKAGE = Path(ddim_plugin.__file__).parent


def push(*arguments, ok=True):
    assert cli.main(["push", *map(str, arguments), "--space"]) == (0 if ok else 1)


def space_card(hub):
    return SpaceCard(hub.files(SPACE)["README.md"].decode())


def test_a_model_and_its_space(hub, folder, capsys):
    push(folder, REPO, "--license", "mit")
    printed = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"{hub.url}/{each}/commit/{hub.commits(each)[0].sha}" for each in (REPO, SPACE)]
    assert "model_index.json" in hub.files(REPO)
    files = hub.files(SPACE)
    code = {f"ddim_plugin/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    assert files.keys() == code | {
        "ddim_plugin/hub/card.md",
        "app.py",
        "requirements.txt",
        "README.md",
        ".gitattributes",
    }
    assert all(files[name] == (PACKAGE.parent / name).read_bytes() for name in code)
    data, text = space_card(hub).data.to_dict(), space_card(hub).text
    assert data["models"] == [REPO]
    assert data["app_file"] == "app.py"
    assert (data["title"], data["sdk"], data["license"]) == ("digits", "gradio", "mit")
    assert f"(https://huggingface.co/{REPO})" in text
    assert "spaces-config-reference" not in text
    assert "license: mit" in card(hub)


def test_requirements_are_those_of_the_package(hub, folder):
    push(folder, REPO)
    lines = hub.files(SPACE)["requirements.txt"].decode().splitlines()
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert {str(Requirement(line)) for line in lines} == {str(Requirement(line)) for line in project["dependencies"]}
    (gradio,) = (Requirement(line) for line in project["optional-dependencies"]["demo"])
    data = space_card(hub).data
    assert data.sdk_version in gradio.specifier
    assert data.python_version.replace(".", "") in "310 311 312 313"
    assert Requirement(f"python{project['requires-python']}").specifier.contains(data.python_version)


def test_the_same_again_makes_no_commit(hub, folder):
    push(folder, REPO, "--license", "mit")
    before = [hub.commits(each) for each in (REPO, SPACE)]
    push(folder, REPO, "--license", "mit")
    assert [hub.commits(each) for each in (REPO, SPACE)] == before
    push_space(REPO)
    assert hub.commits(SPACE) == before[1], "the licence of the Space is kept"


def test_only_what_changed_is_committed(hub, folder):
    push(folder, REPO, "--license", "mit")
    before = hub.commits(SPACE)[0].files
    hub.change(SPACE, {"ddim_plugin/old/code.py": b"1", "ddim_plugin/version.py": b"2", "notes.md": b"3"})
    push(folder, REPO)
    newest = hub.commits(SPACE)[0]
    assert newest.title == "Upload the page of ddim-plugin"
    assert {name: file.data for name, file in newest.files.items() if name != "notes.md"} == {
        name: file.data for name, file in before.items()
    }
    assert hub.files(SPACE)["notes.md"] == b"3"


@pytest.mark.parametrize("text", [b"# Mine\n", b"---\ntitle: Mine\nsdk: gradio\n---\n# Mine\n"])
def test_a_card_of_somebody_stays(hub, folder, text):
    push(folder, REPO)
    hub.change(SPACE, {"README.md": text})
    push(folder, REPO)
    assert hub.files(SPACE)["README.md"] == text


def test_a_new_licence_changes_the_card(hub, folder):
    push(folder, REPO)
    assert space_card(hub).data.license is None
    push(folder, REPO, "--license", "mit")
    assert space_card(hub).data.license == "mit"


def test_private_ones(hub, folder, capsys):
    push(folder, REPO, "--private")
    assert hub.repos[REPO].private
    assert hub.repos[SPACE].private
    hub.add_repo("spaces/ada/open", {"README.md": b"mine"})
    with pytest.raises(ValueError, match="ada/open is public, and private=True"):
        push_space("ada/open", private=True)
    assert hub.files("spaces/ada/open") == {"README.md": b"mine"}


@pytest.mark.parametrize("option", [["--revision", "try"], ["--create-pr"]])
def test_branches_are_refused_before_anything_is_pushed(hub, folder, capsys, option):
    push(folder, REPO, *option, ok=False)
    assert "--space shows the main branch: leave out --revision and --create-pr" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "said"),
    [(READS, "403 Forbidden"), ("hf_nobody", "401 Unauthorized"), (False, "401"), ("", "the token is empty")],
)
def test_tokens(hub, token, said):
    hub.add_repo(SPACE, {"README.md": b"mine"})
    with pytest.raises(OSError, match=said) as caught:
        push_space(REPO, token=token)
    assert hub.files(SPACE) == {"README.md": b"mine"}
    assert TOKEN not in str(caught.value)


def test_an_interrupted_push_leaves_the_space(hub):
    hub.fail_next("POST", "/commit/", status=507)
    with pytest.raises(OSError, match="507"):
        push_space(REPO)
    assert hub.files(SPACE).keys() == {".gitattributes", "README.md"}
    push_space(REPO)
    assert "app.py" in hub.files(SPACE)
    assert space_card(hub).data.models == [REPO]


def test_a_commit_of_somebody_meanwhile(hub):
    push_space(REPO)
    hub.change(SPACE, {"ddim_plugin/version.py": b""})
    hub.fail_next("POST", "/commit/", call=lambda: hub.change(SPACE, {"app.py": b"theirs"}))
    with pytest.raises(OSError, match="412"):
        push_space(REPO)
    assert hub.files(SPACE)["app.py"] == b"theirs"
