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

MEASURED, HEADLINE, COMMANDS = "measured", "headline.md", "commands.md"
"""Where the scripts' own records and tables lie in the folder; they are not pushed."""

BLOCK = re.compile(r"(<!-- (\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
"""In a README, what is to hold the text of that file."""

NEAR = 1.05
"""Times the distance of 1000 steps: what counts as its quality."""

WHOLE = ("nll", "reconstruct", "few_steps", "fit", "table2")
"""Names of those, as .json and .md. evaluate.py's have the name of their folder."""


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
    """Copy records, tables and pictures, and join the `results.json` of all folders.

    Raises ValueError for figures that were measured on other weights, and for two records of one name.
    """
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
            write_json(output / MEASURED / f"{folder.name}.json", found)
            shutil.copyfile(folder / "table.md", output / MEASURED / f"{folder.name}.md")
        for name, caption in found.get("pictures", {}).items():
            target = f"{folder.name}-{name}" if name in joined["pictures"] else name
            if target in joined["pictures"]:
                raise ValueError(f"two of the records have a picture {target}: leave one out")
            shutil.copyfile(folder / name, output / target)
            joined["pictures"][target] = caption
    joined["results"] = public(joined["results"])
    lowest: dict[tuple, dict[str, Any]] = {}
    for entry in joined["results"]:
        kind = (entry["metric"], entry["dataset"]["name"], entry["dataset"].get("split"))
        lowest[kind] = min(lowest.get(kind, entry), entry, key=lambda each: each["value"])
    for entry in joined["results"]:  # the Hub lists one of each kind, the card has all
        if not any(entry is each for each in lowest.values()):
            entry["listed"] = False
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
        for file, text in zip((HEADLINE, COMMANDS), headline(aside, config.output), strict=True):
            write_whole(aside / MEASURED / file, text)
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
    return BLOCK.sub(lambda found: f"{found[1]}\n{(root / found[2]).read_text().strip()}\n\n{found[3]}", text)


def headline(folder: Path, name: str) -> tuple[str, str]:
    """Four numbers in Markdown, each with the record it is from, and the commands that make them again.

    `name` is what the folder is called in links and commands. What was not measured is left out.
    """
    rows, commands = [], []

    def row(value: str, told: str, record: str, made_by: str) -> None:
        links = f"[record]({name}/{record}), [command]({name}/{MEASURED}/{COMMANDS})"
        rows.append(f"| **{value}** | {told} | {links} |")
        commands.append(made_by)

    def read(record: str) -> dict[str, Any]:
        return read_object(folder / record) if (folder / record).is_file() else {}

    few = read(f"{MEASURED}/few_steps.json")
    goal = quality_of_1000(few, read(RESULTS)["results"]) if few else None
    if reached := goal and enough(few["rows"], goal):
        made_by = few["command"].replace(f"--model {few['config']['model']}", f"--model {name}")
        row(*reached, f"{MEASURED}/few_steps.json", made_by)
    found = read(f"{MEASURED}/reconstruct.json")
    of_ten = {each["refinement_steps"] > 0: each for each in found.get("table", ()) if each["S"] == 10}
    if len(of_ten) == 2:
        naive, refined = (f"{of_ten[kind]['mean_squared_error']:.1e}" for kind in (False, True))
        told = f"error for a dimension of held-out images encoded and decoded in ten steps, refined (plain: {naive})"
        made_by = command(
            build(reconstruct.ReconstructConfig, found["config"] | {"model": name, "spacing": found["spacing"]})
        )
        row(refined, told, f"{MEASURED}/reconstruct.json", made_by)
    found = read(f"{MEASURED}/nll.json")
    if ode := found.get("cells", {}).get("ODE"):
        value = f"{ode['bits']:.2f} ± {ode['standard_error']:.2f}"
        told = f"bits per dimension of {ode['images']} held-out images, by the ODE"
        made_by = command(build(nll.NLLConfig, found["config"] | {"model": name, "spacing": found["spacing"]}))
        row(value, told, f"{MEASURED}/nll.json", made_by)
    if found := read("sample.json"):
        settings = found["settings"]
        told = (
            f"seconds for {found['images']} images, S = {settings['steps']}, on {found['cpus']} CPU cores, with loading"
        )
        made_by = f"ddim-plugin sample {name} --num {settings['num']} --steps {settings['steps']}"
        row(f"{found['seconds']:.1f}", told, "sample.json", f"{made_by} --batch-size {settings['batch_size']}")
    table = "\n".join(["| | | |", "|---|---|---|", *rows]) + "\n"
    return table, "\n".join(["```bash", *commands, "```"]) + "\n"


def quality_of_1000(few: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """The lowest Fréchet distance of 1000 steps that was measured, of as many pictures as at few steps."""
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
    return min(found, default=None)


def enough(rows: list[dict[str, Any]], goal: float) -> tuple[str, str] | None:
    """The fewest evaluations with which ours has the quality of 1000, and what is said of them."""
    for row in sorted(rows, key=lambda row: row["nfe"]):
        ours = [each for each in row["frechet"] if each["family"].startswith("ours")]
        best = min(ours, key=lambda each: each["frechet"])
        if best["frechet"] <= NEAR * goal:
            told = f"Fréchet distance {best['frechet']:.3g}, {best['family']}; the best of 1000: {goal:.3g}"
            return str(row["nfe"]), f"steps for the quality of 1000 ({told})"
    return None


if __name__ == "__main__":
    try:
        done = main(parse(PackageConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"package.py: {error}")
    print(f"{len(done['results'])} figures and {len(done['pictures'])} pictures")
