"""Pushing to the Hub: one commit with weights, configs, the code file, the card, and what lies beside it."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
)

from ..pipelines.generation import GeneralizedDDIMPipeline
from ..process.spacings import is_integer
from ..schedulers import GeneralizedDDIMSchedulerOutput
from ..schedulers.config import CLASSES
from .card import adapt, check_license, is_written_here
from .code import STALE
from .files import read_object
from .model import README, UNET, Model, variant_of

RECORDS = re.compile(r"(results|training|conversion)\.json|(samples|loss)\.png|\.eval_results/.+\.yaml")
"""Names of the records that any version of this package pushes."""
PICTURE = re.compile(r"\]\(([\w-]+\.png)\)")  # a picture in a card


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    samples: int = 0,
) -> CommitInfo:
    """Push what `save_pretrained` or the training scripts wrote, in one commit. The folder is not changed.

    A README.md in the folder is the card. The top-level pictures and the records of training scripts are pushed with
    it, as they are. Without one, a card is written, unless the repository has a card that somebody wrote. Records of an
    earlier card are deleted, and the weights of another model.

    Args, the others as for the `push_to_hub` of diffusers:
        folder: the folder of a pipeline. The weights of all variants are pushed.
        repo_id, revision: the repository and its branch. They are created if they do not exist.
        license: the Hub's id of the licence of the weights.
        samples: number of images to generate for a card that is written.

    Returns the commit, or the last one if nothing has changed. Raises ValueError for invalid input before anything is
    sent, and OSError if the Hub cannot be reached or refuses. The branch is not changed then.
    """
    check_license(license)
    if not is_integer(samples) or samples < 0:
        raise ValueError(f"samples must be a non-negative integer, not {samples!r}")
    model = Model(folder)
    if samples and README in model.files:
        raise ValueError(f"{folder} has a {README}, and samples={samples} are for a new card: leave out one of them")
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    with explained(repo_id, token, revision):
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        repo = _Repo(api, repo_id, revision, model)
        if README in model.files:
            text = Path(folder, README).read_text(encoding="utf-8", errors="replace")
            if is_written_here(text):
                model.files[README] = adapt(text, repo_id, license).encode()
        elif repo.card_is_ours and repo.is_same and not samples:
            model.files[README] = adapt(repo.card, repo_id, license).encode()
        elif repo.card_is_ours or not repo.card:
            details = {"samples": model.draw(samples)} if samples else {}
            if repo.card_is_ours and repo.is_same:
                license = license or ModelCard(repo.card).data.license
            model.files[README] = model.card(repo_id, license, None if create_pr else revision, **details).encode()
        changes = [CommitOperationDelete(name) for name in sorted(repo.stale() - model.files.keys())]
        changes += [CommitOperationAdd(name, content) for name, content in sorted(model.files.items())]
        title = commit_message or "Upload GeneralizedDDIMPipeline"
        branch = {"revision": revision, "create_pr": create_pr, "parent_commit": repo.commit}
        return api.create_commit(repo_id, changes, commit_message=title, **branch)


class _Repo:
    """Compare a repository at a revision with the model to push."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, model: Model):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        self.commit, self.model, self.has_card = info.sha, model, README in model.files
        self.files = {each.rfilename: each.lfs and each.lfs["sha256"] for each in info.siblings or ()}
        path = README in self.files and api.hf_hub_download(repo_id, README, revision=info.sha)
        self.card = Path(path).read_text(encoding="utf-8", errors="replace") if path else ""
        self.card_is_ours, self.is_same = is_written_here(self.card), False
        weights = {name: path for name, path in model.files.items() if name.endswith(".safetensors")}
        if {variant_of(name) for name in weights} & {variant_of(name) for name in self.files}:
            here = {name: sha256(path.read_bytes()).hexdigest() for name, path in weights.items()}
            self.is_same = here.items() <= self.files.items()
        elif UNET in self.files:  # no variant is in both: compare the configs
            with suppress(ValueError):  # for a file that is no JSON object
                old = read_object(api.hf_hub_download(repo_id, UNET, revision=info.sha))
                new = json.loads(model.files[UNET])
                self.is_same = all(old.get(key) == new.get(key) for key in old.keys() | new if key[0] != "_")

    def stale(self) -> set[str]:
        """Return the files to delete: older code files, and those of another model, except pictures of a kept card."""
        found = {name for name in self.files if STALE.fullmatch(name)}
        is_ours = bool(found)  # each push adds a code file
        if not self.is_same:
            found |= {name for name in self.files if variant_of(name) is not None}
            found |= {README} if self.card_is_ours else set()
        if is_ours and (self.has_card or not self.is_same):
            shown = PICTURE.findall(self.card) if self.card_is_ours else ()
            found |= {name for name in self.files if name in shown or RECORDS.fullmatch(name)}
        card = self.model.files.get(README, b"" if README in found else self.card.encode())
        text = card if isinstance(card, bytes) else card.read_bytes()
        return {name for name in found if not (name.endswith(".png") and name.encode() in text)}


def push_to_hub(
    self: GeneralizedDDIMPipeline,
    repo_id: str,
    commit_message: str | None = None,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    **settings: Any,
) -> CommitInfo:
    """Push weights, configs, code file and card in one commit.

    Arguments are those of `push_folder`, and `variant` names the weights. Pickles are not pushed.
    """
    if not safe_serialization:
        raise ValueError("pickles are not pushed: leave out safe_serialization=False")
    if type(self) is not GeneralizedDDIMPipeline:
        name = type(self).__name__
        raise ValueError(f"a {name} has code of its own, which is not pushed: push a GeneralizedDDIMPipeline")
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, variant=variant)
        return push_folder(folder, repo_id, commit_message=commit_message, **settings)


GeneralizedDDIMPipeline.push_to_hub = push_to_hub
for each in (GeneralizedDDIMPipeline, GeneralizedDDIMSchedulerOutput, *CLASSES.values()):
    each.__module__ = __package__.partition(".")[0]  # saved files name classes by the package


def open_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create a repository if it does not exist, and return its full id. Raises ValueError if it is not `private`."""
    with explained(repo_id, api.token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is public, and private=True does not change that: nothing was pushed")
    return repo_id


@contextmanager
def explained(repo_id: str, token: Any = None, revision: str | None = None) -> Iterator[None]:
    """Raise failures of the Hub's client as an OSError with the remedy, which never shows the token."""
    used = token if isinstance(token, str) else None if token is False else get_token()
    if used is not None and not (used and used.isascii() and used.isprintable() and " " not in used):
        raise OSError("the token is empty, or contains invalid characters: copy it again")  # the client shows it
    try:
        yield
    except Exception as error:
        chain, where = [error], constants.ENDPOINT
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        statuses = [getattr(getattr(each, "response", None), "status_code", "") for each in chain]
        kinds = "".join(f"{type(each).__name__} {status}\n" for each, status in zip(chain, statuses, strict=True))
        for pattern, remedy in {
            "HFValidation": f"{repo_id!r} is no id of a repository: it must be like user/model",
            "RevisionNotFound": f"{repo_id} has no revision {revision!r} on {where}: use an existing branch",
            "^(Repository|Gated)": f"{repo_id} was not found on {where}, or it is private: log in, or check the id",
            "EntryNotFound": f"{repo_id} on {where} is no pipeline, since a file was not found: check the id",
            " 401|LocalToken": f"{where} refused the token for {repo_id}: log in with `hf auth login`, or set HF_TOKEN",
            " 403": f"the token may not write to {repo_id} on {where}: use a token with write access",
            " 412": f"somebody else pushed to {repo_id} at the same time: push again",
            r" \d": f"{where} answered with status {max(statuses, key=str)} for {repo_id}: try again later",
            "Connect|Timeout|Protocol|Offline|Pipe": f"{where} cannot be reached for {repo_id}: check the connection",
        }.items():
            if re.search(pattern, kinds, re.MULTILINE):
                raise OSError(remedy) from error
        raise
