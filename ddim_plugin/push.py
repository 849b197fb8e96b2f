"""Pushing a saved pipeline to the Hub: one commit with weights, configs, code, card, pictures and results."""

import io
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch import Generator

from .card import MARK, card, eval_results, public, read_object, read_results
from .hub import CODE, INDEX, components, is_ours, open_scheduler, open_unet, read_index, told, with_code
from .images import grid

README, RESULTS, TRAINING, CONVERSION = "README.md", "results.json", "training.json", "conversion.json"
GRID = "samples.png"
DRAWN, DRAWN_STEPS = 16, 20
"""Pictures of the grid that is drawn where there is none, and S for it."""

WEIGHTS = re.compile(r"diffusion_pytorch_model(\.(?P<variant>[^.-]+))?(-\d+-of-\d+)?\.safetensors")


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
    drawn: Image.Image | None = None,
    caption: str = "",
) -> CommitInfo:
    """Push what `save_pretrained` or the training script wrote, in one commit; nothing in the folder is changed.

    The weights of all variants there go along, and from the folder `records` (the same, if not given) `results.json`,
    `training.json`, `conversion.json` and the pictures. A README.md that somebody wrote there is the card; else one is
    written from those (see `card`).

    Args:
        repo_id: id of the repo; it is made where it does not exist.
        private: whether a repo that is made is private. Raises where True and the repo exists and is public.
        token: a token that may write; by default the one that is logged in.
        revision: the branch, made where it does not exist; main by default.
        create_pr: open a pull request instead.
        license: the Hub's id of the licence of the weights.
        drawn, caption: a grid of samples for the card, where the folder has none.

    Returns:
        the commit; where nothing has changed, the last one.

    Raises:
        ValueError: before anything is sent, for a folder, record or id that is not right.
        OSError: where the Hub cannot be reached or refuses. The branch is then as it was; a new repo may be left empty.
    """
    with told(repo_id):
        validate_repo_id(repo_id)  # before the folder is read
    files, said = contents(Path(folder), repo_id, Path(records or folder), license, drawn, caption)
    own_card = isinstance(files[README], Path)
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    with told(repo_id, token, revision, to="write"):
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        there = {each.rfilename for each in info.siblings or ()}
        if README in there and not own_card:
            remote = Path(api.hf_hub_download(repo_id, README, revision=info.sha)).read_text(encoding="utf-8")
            if MARK not in remote or not said:
                del files[README]  # somebody wrote it, or it says more
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in there if CODE.fullmatch(name) and name not in files]
        message = commit_message or "Upload GeneralizedDDIMPipeline"
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)


def open_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """The whole id of a repo that the token may write to, made where it does not exist.

    Raises OSError where the Hub cannot be reached or refuses, ValueError where `private` and the repo is public.
    """
    with told(repo_id, api.token, to="write"):
        validate_repo_id(repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is public, and private=True changes no repo that exists: nothing was pushed")
        return repo_id


def contents(
    folder: Path, repo_id: str, records: Path, license: str | None, drawn: Image.Image | None, caption: str
) -> tuple[dict[str, Path | bytes], bool]:
    """What is pushed, by its name in the repo; and whether the card tells more than the configs do.

    Raises ValueError or OSError for a folder that would not load again, or records that are not in order.
    """
    index = read_index(folder, str(folder))
    if not is_ours(index):
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}: open it with GeneralizedDDIMPipeline.from_pretrained, push that"
        )
    files: dict[str, Path | bytes] = {}
    for component in components(index):
        files |= _component(folder, component)
    files |= _code(folder, index)
    for variant in variants(folder):
        parameters = open_unet(folder, index, str(folder), {"variant": variant}).num_parameters()

    found = {name: records / name for name in (RESULTS, TRAINING, CONVERSION) if (records / name).is_file()}
    results = read_results(found[RESULTS]) if RESULTS in found else []
    training, conversion = (
        public(read_object(found[name])) if name in found else {} for name in (TRAINING, CONVERSION)
    )
    files |= {name: _json(path) for name, path in found.items()}
    pictures = _pictures(records)
    if drawn is not None:
        pictures[GRID] = _png(drawn)
    elif GRID in pictures:
        caption = _caption(records, training)
    files |= pictures | {name: text.encode() for name, text in eval_results(results).items()}

    if (folder / README).is_file() and MARK not in (folder / README).read_text(encoding="utf-8"):
        files[README] = folder / README
        return files, True
    scheduler = open_scheduler(folder, index, str(folder))
    text = card(
        repo_id,
        read_object(folder / "unet" / "config.json"),
        dict(scheduler.config) | {"_class_name": type(scheduler).__name__},
        parameters,
        results,
        training,
        conversion,
        GRID if GRID in pictures else None,
        caption,
        license,
    )
    files[README] = text.encode()
    return files, bool(results or training or conversion or pictures or license)


def _component(folder: Path, component: str) -> dict[str, Path | bytes]:
    """Configs and weights of a component."""
    files: dict[str, Path | bytes] = {}
    for path in sorted((folder / component).glob("*")):
        if path.suffix == ".json":
            files[f"{component}/{path.name}"] = _json(path)
        elif path.suffix == ".safetensors":
            files[f"{component}/{path.name}"] = path
    return files


def variants(folder: str | Path) -> list[str | None]:
    """The variants of the network's weights in a folder, the ordinary ones, None, first."""
    matches = [WEIGHTS.fullmatch(path.name) for path in (Path(folder) / "unet").glob("*.safetensors")]
    found = {match["variant"] for match in matches if match}
    if not found:
        raise ValueError(f"{folder} has no weights as safetensors: open it, and save_pretrained into a new folder")
    return sorted(found, key=lambda variant: variant or "")


def _code(folder: Path, index: dict[str, Any]) -> dict[str, Path | bytes]:
    """`model_index.json` and the code files: those of the folder, or where it has none, ours."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    files: dict[str, Path | bytes] = {name: path for name, path in names.items() if CODE.fullmatch(name)}
    if not isinstance(index["_class_name"], list):
        index, made = with_code(index)
        files = {name: text.encode() for name, text in made.items()}
    return files | {INDEX: (json.dumps(public(index), indent=2) + "\n").encode()}


def _pictures(records: Path) -> dict[str, Path | bytes]:
    """The pictures in a folder; of previews the last, where there are no samples."""
    pictures: dict[str, Path | bytes] = {path.name: path for path in sorted(records.glob("*.png"))}
    previews = sorted(records.glob("previews/*.png"))
    return pictures if GRID in pictures or not previews else pictures | {GRID: previews[-1]}


def has_samples(records: str | Path) -> bool:
    """Whether a folder has a grid of samples for the card."""
    return GRID in _pictures(Path(records))


def _caption(records: Path, training: dict[str, Any]) -> str:
    """What is known of the samples: from the file that the command line writes beside them, or from the training."""
    if (records / GRID).is_file():
        if not (records / "sample.json").is_file():
            return "Samples."
        settings = read_object(records / "sample.json").get("settings", {})
        known = {"S": settings.get("steps"), "η": settings.get("eta"), "the first seed": settings.get("seed")}
        return (
            ", ".join(["Samples", *(f"{name} = {value}" for name, value in known.items() if value is not None)]) + "."
        )
    return f"Samples at S = {training.get('config', {}).get('preview_steps')}, η = 0."


def draw(pipe: Any, number: int = DRAWN, steps: int = DRAWN_STEPS) -> tuple[Image.Image, str]:
    """A grid of samples for the card, in rows of 8, and what is said below it; image i from seed i."""
    steps = min(steps, pipe.scheduler.config.num_train_timesteps)
    classes = pipe.unet.config.num_class_embeds
    labels = [i % classes for i in range(number)] if classes else None
    generators = [Generator().manual_seed(i) for i in range(number)]
    images = pipe(number, steps, generator=generators, class_labels=labels, output_type="np").images
    eta = getattr(pipe.scheduler.config, "eta", None)
    said = f"{type(pipe.scheduler).__name__}, S = {steps}" + ("" if eta is None else f", η = {eta:g}")
    return grid([images[i : i + 8] for i in range(0, number, 8)]), f"{said}, seeds 0 to {number - 1}."


def _json(path: Path) -> bytes:
    """A JSON file without the places of this machine."""
    content = {key: value for key, value in read_object(path).items() if key != "_name_or_path"}
    return (json.dumps(public(content), indent=2) + "\n").encode()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
