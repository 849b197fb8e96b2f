"""Push the page of `ddim-plugin demo` to the Hub as a Space, for `ddim-plugin push --space`."""

from importlib.metadata import requires
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, SpaceCardData

import ddim_plugin
from ddim_plugin.hub.card import is_written_here, sign
from ddim_plugin.hub.push import README, explained, open_repo, push_folder

SPACE = {"repo_type": "space", "space_sdk": "gradio"}
# With the version of Gradio that the page was tested with.
SPACE_DATA = {"sdk": SPACE["space_sdk"], "sdk_version": "6.31.0", "python_version": "3.12", "app_file": "app.py"}
SPACE_TEXT = (
    "Samples, latents and few steps of [{0}](https://huggingface.co/{0}), by ddim-plugin. It runs on any hardware."
)


def main(folder: str, repo_id: str, revision: str | None, create_pr: bool, **settings: Any) -> None:
    """Push a model and its Space, with the `settings` of `push_folder`, and print where they are."""
    if revision or create_pr:
        raise ValueError("--space shows the main branch: leave out --revision and --create-pr")
    print(f"pushed {folder}: {push_folder(folder, repo_id, **settings).commit_url}")
    space = {key: settings[key] for key in ("private", "token", "license")}
    print(f"pushed the page: {push_space(repo_id, **space).commit_url}")


def push_space(
    repo_id: str, private: bool | None = None, token: str | bool | None = None, license: str | None = None
) -> CommitInfo:
    """Push a Space of Gradio that shows the model of the same id: the page of `ddim-plugin demo`, and this package.

    Arguments and errors are those of `push_folder`. A card that somebody wrote is kept. Returns the commit, or the last
    one if nothing has changed.
    """
    api, package = HfApi(token=token), Path(ddim_plugin.__file__).parent
    repo_id = open_repo(api, repo_id, private, **SPACE)
    needed = [line for line in requires("ddim-plugin") or () if ";" not in line]  # without those of extras
    content = [*package.rglob("*.py"), package / "hub" / "card.md"]
    files: dict[str, Path | bytes] = {f"ddim_plugin/{path.relative_to(package).as_posix()}": path for path in content}
    files |= {"app.py": Path(__file__).with_name("app.py"), "requirements.txt": "\n".join([*needed, ""]).encode()}
    with explained(repo_id, token):
        info = api.space_info(repo_id)
        names = {each.rfilename for each in info.siblings or ()}
        path = README in names and api.hf_hub_download(repo_id, README, repo_type="space", revision=info.sha)
        old = Path(path).read_text(encoding="utf-8", errors="replace") if path else ""
        if is_written_here(old) or "spaces-config-reference" in (old or "spaces-config-reference"):  # of a new Space
            license = license or (ModelCard(old).data.license if old else None)
            data = SpaceCardData(title=repo_id.split("/")[-1], models=[repo_id], license=license, **SPACE_DATA)
            files[README] = sign(f"---\n{data}\n---\n\n{SPACE_TEXT.format(repo_id)}\n").encode()
        stale = {name for name in names if name.startswith("ddim_plugin/")} - files.keys()
        changes = [CommitOperationDelete(name) for name in sorted(stale)]
        changes += [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        branch = {"repo_type": "space", "parent_commit": info.sha}
        return api.create_commit(repo_id, changes, commit_message="Upload the page of ddim-plugin", **branch)
