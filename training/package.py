"""Put a trained model and what was measured of it into one folder that can be pushed as it stands.

python training/package.py --model out/fitted/model --records out/mnist out/samples out/table1 out/table2 out/nll \
  --output model_cards/ddim-mnist-28
"""

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nll
import reconstruct
from config import build, command, parse, write_json

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.card import public, read_object, read_results
from ddim_plugin.hub import INDEX, weights_digest, write_whole
from ddim_plugin.push import GRID, LOSS, README, RESULTS, TRAINING, Model

MEASURED, HEADLINE = "measured", "headline.md"
"""Where the scripts' own records and tables lie in the folder; they are not pushed."""

BLOCK = re.compile(r"(<!-- (\S+\.md) -->\n).*?(\n<!-- end -->)", re.DOTALL)
"""In a README, what is to hold the text of that file."""

NEAR = 1.05
"""Times the distance of 1000 steps: what counts as its quality."""

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
    readme: str | None = field(default=None, metadata={"help": "a file whose marked blocks to fill from the folders"})
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
        write_whole(aside / MEASURED / HEADLINE, headline(aside, config.output))
        model = Model(aside, aside)
        write_whole(aside / README, model.card(f"{config.user}/{output.name}", config.license, None, None))
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    if config.readme is not None:
        write_whole(Path(config.readme), fill(Path(config.readme).read_text(), Path(config.readme).parent))
    return joined


def fill(text: str, root: Path) -> str:
    """A README with its marked blocks as the files say."""
    return BLOCK.sub(lambda found: found[1] + (root / found[2]).read_text().strip() + found[3], text)


def headline(folder: Path, name: str) -> str:
    """Four numbers in Markdown, each with the record it is from and the command that makes it again.

    `name` is what the folder is called in links and commands. What was not measured is left out.
    """
    rows = []

    def row(told: str, value: str, record: str, made_by: str) -> None:
        rows.append(f"| {told} | **{value}** | [{Path(record).name}]({name}/{record}) | `{made_by}` |")

    def read(record: str) -> dict[str, Any]:
        return read_object(folder / record) if (folder / record).is_file() else {}

    if few := read(f"{MEASURED}/few_steps.json"):
        few_steps = few["rows"], quality_of_1000(few, read(RESULTS)["results"])
        row(*enough(*few_steps), f"{MEASURED}/few_steps.json", few["command"])
    if found := read(f"{MEASURED}/reconstruct.json"):
        of_ten = {each["refinement_steps"] > 0: each for each in found["table"] if each["S"] == 10}
        naive, refined = (f"{of_ten[kind]['mean_squared_error']:.1e}" for kind in (False, True))
        told = f"error of a reconstruction for a dimension, S = 10, refined (plain: {naive})"
        made_by = command(build(reconstruct.ReconstructConfig, found["config"] | {"model": name}))
        row(told, refined, f"{MEASURED}/reconstruct.json", made_by)
    if found := read(f"{MEASURED}/nll.json"):
        ode = found["cells"]["ODE"]
        told = f"bits per dimension of {ode['images']} test images, by the ODE"
        value = f"{ode['bits']:.2f} ± {ode['standard_error']:.2f}"
        row(told, value, f"{MEASURED}/nll.json", command(build(nll.NLLConfig, found["config"] | {"model": name})))
    if found := read("sample.json"):
        settings = found["settings"]
        told = f"seconds for {found['images']} images at S = {settings['steps']}, on {found['cpus']} CPU cores"
        made_by = f"ddim-plugin sample {name} --num {settings['num']} --steps {settings['steps']}"
        row(told, f"{found['seconds']:.1f}", "sample.json", f"{made_by} --batch-size {settings['batch_size']}")
    return "\n".join(["| | | from | made again by |", "|---|---|---|---|", *rows]) + "\n"


def quality_of_1000(few: dict[str, Any], results: list[dict[str, Any]]) -> float:
    """The lowest Fréchet distance of 1000 steps, of as many pictures as were measured at few steps."""
    images = {each["images"] for row in few["rows"] for each in row["frechet"]}
    metric = f"fd_{Path(few['config']['extractor']).name}"
    found = [
        each["value"]
        for each in results
        if each["metric"] == metric
        and each["nfe"] == 1000
        and {each["images"]} == images
        and each["dataset"].get("split") == "train"
    ]
    if not found:
        raise ValueError(f"no {metric} of {images} pictures at 1000 evaluations was measured")
    return min(found)


def enough(rows: list[dict[str, Any]], goal: float) -> tuple[str, str]:
    """What is said of the fewest evaluations with which ours has the quality of 1000, and their number."""
    for row in sorted(rows, key=lambda row: row["nfe"]):
        ours = [each for each in row["frechet"] if each["family"].startswith("ours")]
        best = min(ours, key=lambda each: each["frechet"])
        if best["frechet"] <= NEAR * goal:
            told = f"Fréchet distance {best['frechet']:.3g}; the best of 1000 steps {goal:.3g}"
            return f"steps for the quality of 1000 ({told})", str(row["nfe"])
    raise ValueError(f"no number of few steps comes within {NEAR} of {goal:.4g}")


if __name__ == "__main__":
    try:
        done = main(parse(PackageConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"package.py: {error}")
    print(f"{len(done['results'])} figures and {len(done['pictures'])} pictures")
