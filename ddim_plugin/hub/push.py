"""Pushing to the Hub: one commit with weights, configs, the code file, the card, and what lies beside it."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token

from ..pipelines.generation import GeneralizedDDIMPipeline
from ..schedulers import GeneralizedDDIMSchedulerOutput
from ..schedulers.config import CLASSES
from .card import adapt, card, is_written_here
from .code import STALE, code

README, GRID, TITLE = "README.md", "samples.png", "Upload GeneralizedDDIMPipeline"
RECORDS = ("results.json", "training.json", "conversion.json")  # of the training scripts, pushed as they are
OF_CARDS = re.compile(r"(results|training|conversion)\.json|loss\.png|\.eval_results/.+\.yaml")  # of any version
INDEX, UNET, SCHEDULER = CONFIGS = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
WEIGHTS = re.compile(
    r"(unet/)?diffusion_pytorch_model(\.(?P<of_file>[^/]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)"
    r"(\.index(\.(?P<of_index>[^/]+))?\.json)?"
)


def variant_of(name: str) -> str | None:
    """Return the variant of a file of weights, or of the index of several, "" for plain ones; None for other files."""
    return match["of_file"] or match["of_index"] or "" if (match := WEIGHTS.fullmatch(name)) else None


class Model:
    """Collect the files to push of a folder that loads, and the data for its card."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise OSError(f"{folder} has no {INDEX}: pass the folder of a saved pipeline")
        if (name := GeneralizedDDIMPipeline.load_config(folder)["_saved_as"][0]) != GeneralizedDDIMPipeline.__name__:
            raise ValueError(f"{folder} is a {name}: load it with GeneralizedDDIMPipeline, push that")
        weights = {f"unet/{p.name}": p for p in folder.glob("unet/*.safetensors*") if variant_of(p.name) is not None}
        if not weights:
            raise ValueError(f"{folder} has no weights as safetensors: load it, and save_pretrained into a new folder")
        for variant in sorted({variant_of(name) for name in weights}, reverse=True):  # all load; the first one is kept
            self.variant = variant or None
            self.pipe = GeneralizedDDIMPipeline.from_pretrained(str(folder), variant=self.variant)
        if "num_classes" in self.pipe.scheduler.config:
            raise ValueError(f"{folder} is a model of categories, which opens with this package alone: copy the folder")
        self.files: dict[str, Path | bytes] = {f"{code().name}.py": code().text.encode(), **weights}
        for name, part in {INDEX: self.pipe, UNET: self.pipe.unet, SCHEDULER: self.pipe.scheduler}.items():
            config = {k: v for k, v in json.loads(part.to_json_string()).items() if k != "_name_or_path"}
            self.files[name] = (json.dumps(config, indent=2) + "\n").encode()
        names = (README, "*.png", *RECORDS) if (folder / README).is_file() else (GRID,)  # the rest belongs to the card
        self.files |= {path.name: path for name in names for path in folder.glob(name) if path.is_file()}

    def card(self, repo_id: str, license: str | None = None, **details: Any) -> str:
        """Write the card, with more `details` for `card`."""
        unet, scheduler, stock = self.pipe.unet, self.pipe.scheduler, json.loads(self.files[INDEX])["_class_name"]
        configs = (dict(unet.config), dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
        details |= {"pipeline": None if stock == GeneralizedDDIMPipeline.__name__ else stock, "variant": self.variant}
        return card(repo_id, *configs, unet.num_parameters(), license, **details)


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
) -> CommitInfo:
    """Push a pipeline that `save_pretrained` or a training script wrote, in one commit. The folder is not changed.

    A README.md in the folder is the card, and top-level pictures and records of training scripts are pushed with it.
    Without one, a plain card is written, with samples.png of the folder, unless the repository has a card that somebody
    wrote. Replacing a card of this package deletes its records, and pictures that are not shown. Weights of variants
    that the folder does not have are kept, and so is the `license`, the Hub's id, if none is given.

    Other arguments are those of the `push_to_hub` of diffusers. Repository and branch are created if they do not exist.
    Returns the commit, or the last one if nothing has changed. Raises ValueError for invalid input and OSError if the
    Hub cannot be reached or refuses, before the branch is changed.
    """
    model, api = Model(folder), HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    with explained(repo_id, token):
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        names, has_card = {each.rfilename for each in info.siblings or ()}, README in model.files
        path = README in names and api.hf_hub_download(repo_id, README, revision=info.sha)
        old = Path(path).read_text(encoding="utf-8", errors="replace") if path else ""
        text = Path(folder, README).read_text(encoding="utf-8", errors="replace") if has_card else old
        if not has_card and (is_written_here(old) or not old):
            license = license or (ModelCard(old).data.license if old else None)
            samples = "" if GRID in model.files else None  # a picture without a caption
            text = model.card(repo_id, license, revision=None if create_pr else revision, samples=samples)
            model.files[README] = text.encode()
        elif is_written_here(text):
            model.files[README] = adapt(text, repo_id, license).encode()
        variants = {variant_of(name) for name in model.files} - {None}
        stale = {name for name in names if STALE.fullmatch(name) or variant_of(name) in variants}
        if is_written_here(old):
            shown = {name for name in names if OF_CARDS.fullmatch(name) or f"]({name})" in old}
            stale |= {name for name in shown if not (name.endswith(".png") and name in text)}
        changes = [CommitOperationDelete(name) for name in sorted(stale - model.files.keys())]
        changes += [CommitOperationAdd(name, content) for name, content in sorted(model.files.items())]
        branch = {"revision": revision, "create_pr": create_pr, "parent_commit": info.sha}
        return api.create_commit(repo_id, changes, commit_message=commit_message or TITLE, **branch)


def push_to_hub(self, repo_id: str, commit_message: str | None = None, *, variant: str | None = None, **settings: Any):
    """Push a pipeline in one commit, as `push_folder` does with these `settings`. `variant` names the weights."""
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder, variant=variant)
        return push_folder(folder, repo_id, commit_message=commit_message, **settings)


GeneralizedDDIMPipeline.push_to_hub = push_to_hub
for each in (GeneralizedDDIMPipeline, GeneralizedDDIMSchedulerOutput, *CLASSES.values()):
    each.__module__ = __package__.partition(".")[0]  # saved files name classes by the package


def open_repo(api: HfApi, repo_id: str, private: bool | None, **kind: str) -> str:
    """Create a repository if it does not exist, and return its full id. Raises ValueError if it is not `private`."""
    with explained(repo_id, api.token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, **kind).repo_id
        if private and not api.repo_info(repo_id, repo_type=kind.get("repo_type")).private:
            raise ValueError(f"{repo_id} is public, and private=True does not change that: nothing was pushed")
    return repo_id


@contextmanager
def explained(repo_id: str, token: Any = None) -> Iterator[None]:
    """Raise failures of the Hub's client as an OSError with the answer of the Hub. It never shows the token."""
    used = token if isinstance(token, str) else get_token() or "none"
    if not re.fullmatch("[!-~]+", used):
        raise OSError("the token is empty, or contains invalid characters: copy it again")  # the client shows it
    try:
        yield
    except Exception as error:
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        known = [each for each in chain if type(each).__module__.startswith(("huggingface_hub", "httpx", "requests"))]
        answers = [each for each in known if getattr(each, "response", None) is not None]
        if known:
            raise OSError(f"{repo_id} on {HfApi().endpoint}: {(answers or known[::-1])[0]}") from error
        raise
