"""Pushing a saved pipeline to the Hub: one commit with weights, configs, code, card, pictures and results."""

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from PIL import Image
from torch import Generator

from ..pipelines.images import grid
from ..process.spacings import is_integer
from ..schedulers.generalized import InverseDDIMScheduler, sampler_class
from .card import card, check_license, entries_of, eval_results, is_written_here, license_of, public
from .files import read_object, weights_digest
from .reading import (
    CODE,
    INDEX,
    check_repo_id,
    components,
    is_ours,
    open_scheduler,
    open_unet,
    read_index,
    scheduler_is_ours,
    told,
    variant_of,
    with_code,
)

README, RESULTS, TRAINING, CONVERSION = "README.md", "results.json", "training.json", "conversion.json"
GRID, LOSS = "samples.png", "loss.png"
CONFIG = "unet/config.json"
CONFIGS = (CONFIG, "scheduler/scheduler_config.json")
RECORDS = (RESULTS, TRAINING, CONVERSION)
PICTURE = re.compile(r"[\w-]+\.png")
DRAWN, DRAWN_STEPS = 16, 20
"""Pictures of the grid that is drawn where there is none, and S for it."""

SAID = re.compile("|".join([*map(re.escape, (*RECORDS, GRID, LOSS)), r"\.eval_results/[^/]+\.yaml"]))
"""Names of what a push says of a model, beside its card."""

Content = Path | bytes


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
    samples: int | None = None,
    sampler: Callable[[], Any] | None = None,
) -> CommitInfo:
    """Push what `save_pretrained` or the training script wrote, in one commit; nothing in the folder is changed.

    The weights of all variants there go along, and from the folder `records` (the same, if not given) `results.json`,
    `training.json`, `conversion.json`, `samples.png` (or the last of `previews/`), `loss.png`, and the pictures that
    `results.json` names under "pictures". A README.md that somebody wrote in the folder, else one in the repo, is the
    card; else one is written from the records (see `card`). Where a model of this package with other weights is in the
    repo, what was said of it goes.

    Args:
        repo_id: id of the repo; it is made where it does not exist.
        private: whether a repo that is made is private. Raises where True and the repo exists and is public.
        token: a token that may write; by default the one that is logged in.
        revision: the branch, made where it does not exist; main by default.
        create_pr: open a pull request instead.
        license: the Hub's id of the licence of the weights.
        samples: number of pictures to draw for the card; by default 16 where `records` has none, and there is a
            `sampler`, which gives the pipeline to draw them with.

    Returns:
        the commit; where nothing has changed, the last one.

    Raises:
        ValueError: before anything is sent, for a folder, record or id that is not right.
        OSError: where the Hub cannot be reached or refuses. The branch is then as it was; a new repo may be left empty.
    """
    check_repo_id(repo_id)
    check_license(license)
    if samples is not None and (not is_integer(samples) or samples < 0):
        raise ValueError(f"samples must be a non-negative integer, not {samples!r}")
    folder, records = Path(folder), Path(records or folder)
    if not records.is_dir():
        raise ValueError(f"there is no folder {records}")
    branch = None if revision is None or revision.startswith("refs/") else revision
    model = Model(folder, records)
    api = HfApi(token=token)
    repo_id = open_repo(api, repo_id, private)
    with told(repo_id, token, revision, to="write"):
        if branch is not None and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        there = {each.rfilename: each for each in info.siblings or ()}
        texts = {}
        for name in (README, INDEX, RESULTS, CONFIG):
            if name in there:
                path = api.hf_hub_download(repo_id, name, revision=info.sha)
                texts[name] = Path(path).read_text(encoding="utf-8", errors="replace")

    files = dict(model.files)
    same = _same_model(there, files, _object(texts.get(CONFIG, "")))
    card_there = texts.get(README, "")
    ours = is_written_here(card_there)
    if model.own_card is not None:
        files[README] = model.own_card
    elif not card_there or (ours and (model.said or not same)):  # not somebody's, nor one that says more
        drawn = None
        if sampler is not None and samples != 0 and (samples or GRID not in model.pictures):
            drawn = draw(sampler(), samples or DRAWN, classes=model.classes)
            files[GRID] = _png(drawn[0])
        license = license or model.license or (license_of(card_there) if ours and same else None)
        files[README] = model.card(repo_id, license, drawn, branch).encode()
    stale = {name for name in there if CODE.fullmatch(name) or (not same and variant_of(name) is not None)}
    if is_ours(_object(texts.get(INDEX, ""))) and (model.said or not same):
        listed = _object(texts.get(RESULTS, "")).get("pictures")
        listed = listed if isinstance(listed, list | dict) else []
        stale |= {name for name in there if SAID.fullmatch(name) or (name in listed and PICTURE.fullmatch(name))}
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale & there.keys() - files.keys())]
    with told(repo_id, token, revision, to="write"):
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload GeneralizedDDIMPipeline",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )


def open_repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """The whole id of a repo that the token may write to, made where it does not exist.

    Raises OSError where the Hub cannot be reached or refuses, ValueError where `private` and the repo is public.
    """
    check_repo_id(repo_id)
    with told(repo_id, api.token, to="write"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is public, and private=True changes no repo that exists: nothing was pushed")
        return repo_id


def _same_model(there: dict[str, Any], files: dict[str, Content], config: dict[str, Any]) -> bool:
    """Whether the repo has this network: these weights, or none of their variants and the same config."""
    weights = {name: content for name, content in files.items() if variant_of(name) is not None}
    pushed = {variant_of(name) for name in weights}
    if any(variant_of(name) in pushed for name in there):
        return all(name in there and _digest(content, there[name]) for name, content in weights.items())
    configs = (json.loads(files[CONFIG]), config)
    first, second = ({key: value for key, value in each.items() if not key.startswith("_")} for each in configs)
    return first == second


def _object(text: str) -> dict[str, Any]:
    """A JSON object of a repo; an empty one where the text is none."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _digest(content: Content, there: Any) -> bool:
    """Whether a file in the repo has this content, by the digest that the Hub keeps of it."""
    data = content.read_bytes() if isinstance(content, Path) else content
    if there.lfs is not None:
        return hashlib.sha256(data).hexdigest() == there.lfs["sha256"]
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


# ---- what is pushed ------------------------------------------------------------------------------------------------


class Model:
    """What is pushed of a folder, by its name in the repo (`files`), and what is known of the model.

    Raises ValueError or OSError for a folder that would not load again, or records that are not in order.
    """

    def __init__(self, folder: Path, records: Path):
        index = _index(folder)
        self.records = records
        self.files = _code(folder, index) | _state(folder)
        for name in CONFIGS:
            content = read_object(folder / name)
            self.files[name] = _json(content, folder / name, finite=False)  # some schedulers have infinite settings
        found = {name: read_object(records / name) for name in RECORDS if (records / name).is_file()}
        self.results = public(entries_of(found[RESULTS], records / RESULTS)) if RESULTS in found else []
        self.training, self.conversion = (public(found.get(name, {})) for name in (TRAINING, CONVERSION))
        listed = listed_pictures(found.get(RESULTS, {}).get("pictures", {}), records / RESULTS)
        self.pictures = _pictures(records, list(listed))
        self.captions = {name: public(told) for name, told in listed.items() if told and name in self.pictures}
        measured = found.get(RESULTS, {}).get("model")
        measured = measured.get("sha256") if isinstance(measured, dict) else None  # of the weights, where it is noted

        self.variants, fits = variants(folder), measured is None
        for variant in self.variants:
            self.unet = open_unet(folder, index, str(folder), {"variant": variant})
            fits = fits or weights_digest(self.unet) == measured
        if not fits:
            raise ValueError(f"{records / RESULTS} was measured on other weights than those in {folder}: measure these")
        self.scheduler = open_scheduler(folder, index, str(folder))
        self.files |= {name: _json(content, records / name) for name, content in found.items()} | self.pictures
        self.files |= {name: text.encode() for name, text in eval_results(self.results).items()}
        self.said = bool(self.results or self.training or self.conversion or self.pictures)
        own = folder / README
        written = own.is_file() and not is_written_here(own.read_text(encoding="utf-8", errors="replace"))
        self.own_card = own if written else None
        self.license = license_of(own.read_text(encoding="utf-8")) if own.is_file() and not written else None
        self.card("user/model", None, None, None)  # finds records that are not in order before anything is sent

    @property
    def classes(self) -> int | None:
        """How many classes the training had; the network may have a label more, for none of them."""
        classes = self.training.get("classes")
        return len(classes) if isinstance(classes, list) and classes else None

    def card(
        self, repo_id: str, license: str | None, drawn: tuple[Image.Image, str] | None, revision: str | None
    ) -> str:
        """The card, with a grid that was drawn for it, or the one in the records."""
        caption = ""
        try:
            if drawn is not None:
                caption = drawn[1]
            elif GRID in self.pictures:
                caption = _caption(self.records, self.training)
            return card(
                repo_id,
                dict(self.unet.config),
                dict(self.scheduler.config) | {"_class_name": type(self.scheduler).__name__},
                self.unet.num_parameters(),
                self.results,
                self.training,
                self.conversion,
                GRID if drawn is not None or GRID in self.pictures else None,
                caption,
                self.captions,
                license,
                self.variants[0],
                revision,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the records in {self.records} are not as the scripts write them: {error!r}") from error


def _index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` holds, where all readers can open what it names."""
    index = read_index(folder, str(folder))
    if not is_ours(index):
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}: open it with GeneralizedDDIMPipeline.from_pretrained, push that"
        )
    for key, (module, name) in components(index).items():
        if key not in ("unet", "scheduler") or not (
            module == "diffusers" or (key == "scheduler" and scheduler_is_ours(index))
        ):
            raise ValueError(f"{folder}: {INDEX} names {name} of {module} for {key}, which others do not have")
    return index


def variants(folder: str | Path) -> list[str | None]:
    """The variants of the network's weights in a folder, the ordinary ones, None, first."""
    found = sorted({variant_of(name) or "" for name in _state(Path(folder)) if not name.endswith(".json")})
    if not found:
        raise ValueError(f"{folder} has no weights as safetensors: open it, and save_pretrained into a new folder")
    return [variant or None for variant in found]


def same_weights(folder: str | Path, other: str | Path, variant: str | None) -> bool:
    """Whether another folder holds the network's weights of this one, in the same files."""
    names = [name for name in _state(Path(folder)) if variant_of(name) == (variant or "")]
    if not all((Path(other) / name).is_file() for name in names):
        return False
    return all((Path(other) / name).read_bytes() == (Path(folder) / name).read_bytes() for name in names)


def _state(folder: Path) -> dict[str, Content]:
    """The network's weights as safetensors, and the indexes of those in several files."""
    names = {f"unet/{path.name}": path for path in sorted((folder / "unet").glob("diffusion_pytorch_model*"))}
    return {name: path for name, path in names.items() if variant_of(name) is not None and ".bin" not in name}


def _code(folder: Path, index: dict[str, Any]) -> dict[str, Content]:
    """`model_index.json` and the code files it names: those of the folder, or where some are missing, ours.

    Raises ValueError for a file whose content is not the one its name was made from.
    """
    made, ours = with_code(index)
    files: dict[str, Content] = {name: text.encode() for name, text in ours.items()}
    if isinstance(index["_class_name"], list):
        stem, new = (each["_class_name"][0].removesuffix("_pipeline") for each in (index, made))
        there = {name.replace(new, stem): folder / name.replace(new, stem) for name in ours}
        if all(path.is_file() for path in there.values()):
            for path in there.values():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
                if path.stem == stem and not stem.endswith(f"_{digest}"):
                    raise ValueError(f"{path} was changed since it was saved: save the pipeline again")
            made, files = index, dict(there)
    return files | {INDEX: (json.dumps(public(made), indent=2) + "\n").encode()}


def listed_pictures(listed: Any, file: Path) -> dict[str, str]:
    """The pictures that `results.json` names, a list or captions by name, with their captions. Raises ValueError."""
    named = {str(name): "" for name in listed} if isinstance(listed, list) else listed
    if not isinstance(named, dict) or not all(
        isinstance(told, str) and PICTURE.fullmatch(name) for name, told in named.items()
    ):
        raise ValueError(
            f'{file} must list names such as figure4.png under "pictures", or captions by name: {listed!r}'
        )
    return named


def _pictures(records: Path, listed: list[str]) -> dict[str, Content]:
    """The pictures in a folder that belong to the model; of previews the last, where there are no samples."""
    names = [GRID, LOSS, *listed]
    pictures: dict[str, Content] = {name: records / name for name in names if (records / name).is_file()}
    previews = sorted(records.glob("previews/*.png"))
    return pictures if GRID in pictures or not previews else pictures | {GRID: previews[-1]}


def _caption(records: Path, training: dict[str, Any]) -> str:
    """What is known of the samples: from the file that the command line writes beside them, or from the training."""
    if (records / GRID).is_file():
        settings = {}
        if (records / "sample.json").is_file():
            settings = read_object(records / "sample.json").get("settings", {})
        known = {"S": settings.get("steps"), "η": settings.get("eta"), "the first seed": settings.get("seed")}
        return (
            ", ".join(["Samples", *(f"{name} = {value}" for name, value in known.items() if value is not None)]) + "."
        )
    return f"Samples at S = {training.get('config', {}).get('preview_steps')}, η = 0."


def draw(pipe: Any, number: int, steps: int = DRAWN_STEPS, classes: int | None = None) -> tuple[Image.Image, str]:
    """A grid of samples for the card, in rows of 8, and what is said below it; image i from seed i.

    Of a conditional network image i is of class i modulo `classes`, by default as many as it has labels.
    """
    kept = pipe.scheduler
    if isinstance(kept, InverseDDIMScheduler):
        pipe.scheduler = sampler_class(kept).from_config(kept.config)
    steps = min(steps, pipe.scheduler.config.num_train_timesteps)
    classes = classes or pipe.unet.config.num_class_embeds
    labels = [i % classes for i in range(number)] if classes else None
    generators = [Generator().manual_seed(i) for i in range(number)]
    try:
        images = pipe(number, steps, generator=generators, class_labels=labels, output_type="np").images
        eta = getattr(pipe.scheduler.config, "eta", None)
        said = f"{type(pipe.scheduler).__name__}, S = {steps}" + ("" if eta is None else f", η = {eta:g}")
    finally:
        pipe.scheduler = kept
    return grid([images[i : i + 8] for i in range(0, number, 8)]), f"{said}, seeds 0 to {number - 1}."


def _json(content: dict[str, Any], path: Path, finite: bool = True) -> bytes:
    """A JSON file without the places of this machine. Raises ValueError for numbers that JSON does not have."""
    content = {key: value for key, value in content.items() if key != "_name_or_path"}
    try:
        return (json.dumps(public(content), indent=2, allow_nan=not finite) + "\n").encode()
    except ValueError as error:
        raise ValueError(f"{path} holds a number that is not finite, which JSON does not have") from error


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
