"""Pushing to the Hub: one commit with weights, configs, the code file, card, pictures and results."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..pipelines.generation import GeneralizedDDIMPipeline
from ..process.spacings import is_integer
from .card import check_license, is_written_here, license_of
from .code import STALE
from .model import INDEX, SAVED, Model, draw, is_ours, same_weights, variant_of
from .records import GRID, PICTURE, README, RESULTS

UNET = "unet/config.json"


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
    records: str | Path | None = None,
    card: bool | None = None,
    samples: int | None = None,
) -> CommitInfo:
    """Push what `save_pretrained` or the training script wrote, in one commit. The folder is not changed.

    The weights of all variants are pushed, with the records and pictures that are in `records`. A README.md that
    somebody wrote is the card: the one in the folder, or else the one in the repository. If the repository has a model
    of this package with other weights, its weights and records are deleted.

    Args:
        folder: the folder of a pipeline.
        repo_id: id of the repository. It is created if it does not exist.
        commit_message: title of the commit.
        private: whether a new repository is private.
        token: a token with write access. By default the one of `hf auth login`, or HF_TOKEN.
        revision: the branch, created if it does not exist; main by default.
        create_pr: open a pull request instead.
        license: the Hub's id of the licence of the weights.
        records: folder with `results.json`, `training.json`, `samples.png`, `loss.png` and the pictures that
            `results.json` names; `folder` by default.
        card: whether to write a card. By default if there are records or samples, or an earlier card to update.
        samples: number of images to generate for the card; none by default.

    Returns:
        the commit; the last one if nothing has changed.

    Raises:
        ValueError: for an invalid folder, record or setting, before anything is sent; if `private` is True and the
            repository is public.
        OSError: if the Hub cannot be reached or refuses. The branch is not changed then.
    """
    check_repo_id(repo_id)
    check_license(license)
    if samples is not None and (not is_integer(samples) or samples < 0):
        raise ValueError(f"samples must be a non-negative integer, not {samples!r}")
    model = Model(folder, records)
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    with tempfile.TemporaryDirectory() as scratch, explained(repo_id, token, revision):
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        repo = _Repo(api, repo_id, revision, model)
        if repo.needs_card(card, samples):
            caption = None
            if samples:
                model.files[GRID], caption = draw(model.pipe, samples, model.classes)
            license = (
                license or model.license or (license_of(repo.card) if repo.card_is_ours and repo.is_same else None)
            )
            model.files[README] = model.card(repo_id, license, None if create_pr else revision, caption).encode()
        for name, content in model.files.items():
            path = Path(scratch, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=scratch,
            commit_message=commit_message or "Upload GeneralizedDDIMPipeline",
            revision=revision,
            create_pr=create_pr,
            parent_commit=repo.commit,
            delete_patterns=[escape(name) for name in sorted(repo.stale() - model.files.keys())] or None,
        )


class _Repo:
    """What a repository holds at a revision, beside the model that is pushed to it."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, model: Model):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        self.commit, self.model = info.sha, model
        self.files = {each.rfilename: each for each in info.siblings or ()}
        texts = {}
        for name in {README, INDEX, RESULTS, UNET} & self.files.keys():
            path = api.hf_hub_download(repo_id, name, revision=info.sha)
            texts[name] = Path(path).read_text(encoding="utf-8", errors="replace")
        self.card = texts.get(README, "")
        self.card_is_ours = is_written_here(self.card)
        self.is_ours = is_ours(_object(texts.get(INDEX)))
        self.results = _object(texts.get(RESULTS))
        self.is_same = _same_model(self.files, model.files, _object(texts.get(UNET)))

    def needs_card(self, card: bool | None, samples: int | None) -> bool:
        """Test whether to write a card: if asked, or with records, or to update ours. Those of others are kept."""
        new = bool(card or samples or self.model.has_records)
        if README in self.model.files or card is False or (self.card and not self.card_is_ours):
            return False
        return new or (self.card_is_ours and not self.is_same)

    def stale(self) -> set[str]:
        """Return the files to delete: older code files, and the weights, records and card of another model."""
        code = {name for name in self.files if STALE.fullmatch(name)}
        weights = {name for name in self.files if variant_of(name) is not None}
        card = {README} if self.card_is_ours else set()
        found = code if self.is_same else code | weights | card
        if self.is_ours and (self.model.has_records or not self.is_same):
            listed = self.results.get("pictures")
            listed = listed if isinstance(listed, list | dict) else []
            found |= {name for name in self.files if SAVED.fullmatch(name)}
            found |= {name for name in listed if name in self.files and PICTURE.fullmatch(name)}
        return found


def push_to_hub(
    self: GeneralizedDDIMPipeline,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    records: str | os.PathLike | None = None,
    card: bool | None = None,
    samples: int | None = None,
) -> CommitInfo:
    """Push to the Hub in one commit: weights, configs and code file, and card, pictures and results if there are any.

    Nothing local is changed. There is no commit if nothing has changed since the last push.

    Args:
        repo_id: id of the repository, such as "user/model". It is created if it does not exist.
        safe_serialization: must be True, pickles are not pushed.
        variant: name of the weights, such as "fp16" for a network in half precision.
        records: folder with records and pictures. By default the one that this pipeline was loaded from, if its weights
            are still those.
        commit_message, private, token, create_pr, revision, license, card, samples: as for `push_folder`.

    Returns:
        the commit, whose text is its URL.

    Raises:
        ValueError: for invalid settings or records, before anything is sent.
        OSError: if the Hub cannot be reached or refuses.
    """
    if not safe_serialization:
        raise ValueError("pickles are not pushed: leave out safe_serialization=False")
    if type(self) is not GeneralizedDDIMPipeline:
        raise ValueError(
            f"a {type(self).__name__} has code of its own, which cannot be pushed: push a GeneralizedDDIMPipeline"
        )
    check_repo_id(repo_id)
    source = self.name_or_path or ""
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, variant=variant)
        if records is None and os.path.isdir(source) and same_weights(folder, source, variant):
            records = source
        settings = {"license": license, "records": records, "card": card, "samples": samples, "create_pr": create_pr}
        settings |= {"commit_message": commit_message, "private": private, "token": token, "revision": revision}
        return push_folder(folder, repo_id, **settings)


def open_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create a repository if it does not exist, and return its full id.

    Raises OSError if the Hub cannot be reached or refuses, ValueError if `private` is True and the repository public.
    """
    check_repo_id(repo_id)
    with explained(repo_id, api.token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        public = private and not api.model_info(repo_id).private
    if public:
        raise ValueError(f"{repo_id} is public, and private=True does not change that: nothing was pushed")
    return repo_id


def _same_model(there: dict[str, Any], files: dict[str, Path | bytes], config: dict[str, Any]) -> bool:
    """Test whether a repository has this network: these weights, or none of their variants and the same config."""
    weights = {name: content for name, content in files.items() if variant_of(name) is not None}
    pushed = {variant_of(name) for name in weights}
    if any(variant_of(name) in pushed for name in there):
        return all(name in there and _same_content(content, there[name]) for name, content in weights.items())
    configs = (_object(files[UNET]), config)
    first, second = ({key: value for key, value in each.items() if not key.startswith("_")} for each in configs)
    return first == second


def _same_content(content: Path | bytes, there: Any) -> bool:
    """Test whether a file of a repository has this content, by the digest that the Hub lists."""
    data = content.read_bytes() if isinstance(content, Path) else content
    if there.lfs is not None:
        return hashlib.sha256(data).hexdigest() == there.lfs["sha256"]
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


def _object(text: Any) -> dict[str, Any]:
    """Return a JSON object in a repository; an empty one for anything else."""
    try:
        content = json.loads(text or "null")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# ---- failures of the Hub's client --------------------------------------------------------------------------------


def check_repo_id(repo_id: str) -> None:
    """Raise OSError for an invalid id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OSError(f"{repo_id!r} is no id of a repository: it must be like user/model") from error


@contextmanager
def explained(repo_id: str, token: Any = None, revision: str | None = None) -> Iterator[None]:
    """Raise failures of the Hub's client as an OSError with the remedy, which never shows the token."""
    used = token if isinstance(token, str) else None if token is False else get_token()
    if used is not None and not (used and used.isascii() and used.isprintable() and " " not in used):
        raise OSError("the token is empty, or has characters that no token has: copy it again")  # the client shows it
    try:
        yield
    except Exception as error:
        remedy = _remedy(error, repo_id, revision)
        if remedy is None:
            raise
        raise OSError(remedy) from error


def _remedy(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    """Return what went wrong and what to do, for failures of the Hub's client."""
    where, chain, each = constants.ENDPOINT, [], error
    while each is not None:
        chain.append(each)
        each = each.__cause__ or each.__context__
    if any(isinstance(each, RevisionNotFoundError) for each in chain):
        return f"{repo_id} has no revision {revision!r} on {where}: use an existing branch"
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        return f"Repository {repo_id} was not found on {where}, or it is private: log in, or check the name"
    answers = [each.response for each in chain if isinstance(each, HfHubHTTPError) and each.response is not None]
    if answers:
        known = {
            401: f"{where} refused the token for {repo_id}: log in with `hf auth login`, or pass another token",
            403: f"the token may not write to {repo_id} on {where}: use a token with write access",
            412: f"somebody else pushed to {repo_id} at the same time: push again",
        }
        status = answers[0].status_code
        return known.get(status, f"{where} answered with status {status} for {repo_id}: try again later")
    if any(isinstance(each, LocalTokenNotFoundError) for each in chain):
        return f"{where} requires a token for {repo_id}: log in with `hf auth login`, set HF_TOKEN, or pass a token"
    kinds = [f"{type(each).__name__} {isinstance(each, ConnectionError)}" for each in chain]
    if any(re.search("Connect|Timeout|Protocol|True", kind) for kind in kinds):
        return f"{where} cannot be reached: check the connection, and push {repo_id} again"
    return None
