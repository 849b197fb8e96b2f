"""Put a trained model and what was measured of it into one folder that can be pushed as it stands.

python training/package.py --model out/fitted/model --records out/mnist out/samples out/table1 out/table2 out/nll \
  --output model_cards/ddim-mnist-28
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import parse, write_json

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.card import public, read_object, read_results
from ddim_plugin.hub import INDEX, weights_digest, write_whole
from ddim_plugin.push import GRID, LOSS, README, RESULTS, TRAINING, Model

MEASURED = "measured"
"""Where the scripts' own records and tables lie in the folder; they are not pushed."""

WHOLE = ("nll", "reconstruct", "few_steps", "fit", "table", "table2")
"""Names of those, as .json and .md."""


@dataclass(frozen=True)
class PackageConfig:
    """Put a model, the record of its training and its measurements into one folder, with a card made of them."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, the training, or ddim-plugin fit"})
    output: str = field(metadata={"help": "the folder to write; its name is that of the model"})
    records: tuple[str, ...] = field(
        metadata={"help": "what train.py, evaluate.py, reconstruct.py, nll.py, ddim-plugin sample and fit wrote for it"}
    )
    user: str = field(default="user", metadata={"help": "of the Hub, for the examples in the card"})
    license: str | None = field(default=None, metadata={"help": "of the weights, as the Hub names it"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier package"})


def check(config: PackageConfig) -> None:
    """Raise ValueError for folders that cannot be read or written."""
    for name in (config.model, *config.records):
        if not Path(name).is_dir():
            raise ValueError(f"there is no folder {name}")
    output = Path(config.output)
    if output.resolve() in [Path(name).resolve() for name in (config.model, *config.records)]:
        raise ValueError(f"{output} is one of the folders that are read: choose another output")
    if output.exists() and any(output.iterdir()):
        if not config.overwrite:
            raise ValueError(f"{output} is not empty: choose another output, or pass --overwrite")
        if not (output / INDEX).is_file():
            raise ValueError(f"{output} is no model that --overwrite may replace: choose another output")


def gather(folders: list[Path], output: Path, digest: str) -> dict[str, Any]:
    """Copy records, tables and pictures, and join the `results.json` of all folders. Raises ValueError for a figure
    that was measured on other weights, or two pictures of one name."""
    joined: dict[str, Any] = {"model": {"sha256": digest}, "results": [], "pictures": {}}
    (output / MEASURED).mkdir()
    for folder in folders:
        for name in (TRAINING, "sample.json"):
            if (folder / name).is_file():
                write_json(output / name, public(read_object(folder / name)))
        for name in (GRID, LOSS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, output / name)
        for name in WHOLE:
            if (folder / f"{name}.json").is_file():
                write_json(output / MEASURED / f"{name}.json", public(read_object(folder / f"{name}.json")))
            if (folder / f"{name}.md").is_file():
                shutil.copyfile(folder / f"{name}.md", output / MEASURED / f"{name}.md")
        if not (folder / RESULTS).is_file():
            continue
        found = public(read_object(folder / RESULTS))
        if found.get("model", {}).get("sha256") != digest:
            raise ValueError(f"{folder / RESULTS} was measured on other weights than those of the model")
        joined["results"] += read_results(folder / RESULTS)
        if "references" in found:  # of evaluate.py, which has no other record
            write_json(output / MEASURED / RESULTS, found)
        for name, caption in found.get("pictures", {}).items():
            if name in joined["pictures"]:
                raise ValueError(f"two of the records have a picture {name}: leave one out")
            shutil.copyfile(folder / name, output / name)
            joined["pictures"][name] = caption
    joined["results"] = public(joined["results"])
    return joined


def main(config: PackageConfig) -> dict[str, Any]:
    """Write the folder, whole or not at all, and its card; return what `results.json` holds."""
    check(config)
    output = Path(config.output)
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        aside = Path(scratch) / output.name
        pipe.save_pretrained(aside)
        joined = gather([Path(name) for name in config.records], aside, weights_digest(pipe.unet))
        write_json(aside / RESULTS, joined)
        model = Model(aside, aside)
        write_whole(aside / README, model.card(f"{config.user}/{output.name}", config.license, None, None))
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    return joined


if __name__ == "__main__":
    try:
        done = main(parse(PackageConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"package.py: {error}")
    print(f"{len(done['results'])} figures and {len(done['pictures'])} pictures")
