"""Put a trained model and what was measured of it into one folder that can be pushed as it stands.

python training/package.py --model out/fitted/model --records out/mnist out/samples out/table1 out/table2 out/nll \
  --output model_cards/ddim-mnist-28
"""

import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nll
import reconstruct
from measure.extractors import slug
from trainer.settings import build, command, parse, put_in_place, write_json

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub.card import is_written_here, public, read_object, read_results
from ddim_plugin.hub.push import CONFIGS, GRID, LOSS, README, RESULTS, TRAINING, Model, listed_pictures
from ddim_plugin.hub.reading import weights_digest, write_whole

MEASURED, HEADLINE, COMMANDS = "measured", "headline.md", "commands.md"
"""Where the scripts' own records and tables lie in the folder; they are not pushed."""

BLOCK = re.compile(r"(<!-- (\S+\.md) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
"""In a README, what is to hold the text of that file."""

HIGHER = ("is", "inception_score", "precision", "recall")
"""How the names of metrics begin that are better where they are higher."""

NEAR = 1.05
"""Times the distance of 1000 steps: what counts as its quality."""

FEW_STEPS = "few_steps.json"

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
    """Raise ValueError for folders that cannot be read or written, and for a README that cannot be filled."""
    inputs = [Path(name) for name in (config.model, *config.records)]
    for path in inputs:
        if not path.is_dir():
            raise ValueError(f"there is no folder {path}")
    output = Path(config.output)
    if any(output.resolve() in (path.resolve(), *path.resolve().parents) for path in inputs):
        raise ValueError(f"{output} holds what is read: choose another output")
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        if not config.overwrite:
            raise ValueError(f"{output} is not empty: choose another output, or pass --overwrite")
        card = output / README
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        if output.is_symlink() or not (output / MEASURED).is_dir() or not is_written_here(text):
            raise ValueError(f"{output} is no package as it was written, for --overwrite to replace: choose another")
    if config.readme is not None:
        root, made = Path(config.readme).parent, output.resolve()
        for _, name, _ in BLOCK.findall(Path(config.readme).read_text(encoding="utf-8")):
            if not (root / name).is_file() and made not in (root / name).resolve().parents:
                raise ValueError(f"{config.readme} has a block for {name}, which is not there")


def gather(folders: list[Path], output: Path, digest: str) -> dict[str, Any]:
    """Copy records, tables and pictures, and join the `results.json` of all folders.

    Raises ValueError for figures that were measured on other weights, for two files of one name, and for figures of two
    extractors of one name.
    """
    joined: dict[str, Any] = {"model": {"sha256": digest}, "results": [], "pictures": {}}
    extractors: dict[str, str] = {}
    (output / MEASURED).mkdir()

    def take(source: Path, target: Path) -> None:
        if not source.is_file():
            return
        if target.exists():
            raise ValueError(f"two of the records would be {target.relative_to(output)}: leave out that in {source}")
        if source.suffix == ".json":
            write_json(target, public(read_object(source)))
        else:
            shutil.copyfile(source, target)

    for folder in folders:
        for name in (TRAINING, "sample.json", GRID, LOSS):
            take(folder / name, output / name)
        for name in WHOLE:
            take(folder / f"{name}.json", output / MEASURED / f"{name}.json")
            take(folder / f"{name}.md", output / MEASURED / f"{name}.md")
        for name, fingerprint in _extractors(folder):
            if extractors.setdefault(slug(name), fingerprint) != fingerprint:
                raise ValueError(f"{folder} was measured with another extractor {slug(name)} than a record before it")
        if not (folder / RESULTS).is_file():
            continue
        found = read_object(folder / RESULTS)
        if found.get("model", {}).get("sha256") != digest:
            raise ValueError(f"{folder / RESULTS} was measured on other weights than those of the model")
        if found.get("status", "finished") != "finished":
            raise ValueError(f"{folder / RESULTS} is of a run that is not finished: let it go on, or ask for less")
        joined["results"] += public(read_results(folder / RESULTS))
        if "references" in found:  # of evaluate.py, which has no other record
            take(folder / RESULTS, output / MEASURED / f"{folder.name}.json")
            take(folder / "table.md", output / MEASURED / f"{folder.name}.md")
        for name, caption in listed_pictures(found.get("pictures", {}), folder / RESULTS).items():
            target = f"{folder.name}-{name}" if name in joined["pictures"] else name
            take(folder / name, output / target)
            joined["pictures"][target] = public(caption)
    best: dict[tuple, dict[str, Any]] = {}
    for entry in joined["results"]:
        kind = (entry["metric"], entry["dataset"]["name"], entry["dataset"].get("split"))
        sign = -1 if entry["metric"].startswith(HIGHER) else 1
        if entry.get("listed", True):
            best[kind] = min(best.get(kind, entry), entry, key=lambda each: sign * each["value"])
    for entry in joined["results"]:  # the Hub lists one of each kind, the card has all
        if not any(entry is each for each in best.values()):
            entry["listed"] = False
    return joined


def _extractors(folder: Path) -> list[tuple[str, str]]:
    """Names and fingerprints of the extractors that Fréchet distances in this folder were measured with."""
    found = read_object(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    used = [(each["name"], each["fingerprint"]) for each in found.get("extractors", ())]
    few = read_object(folder / FEW_STEPS) if (folder / FEW_STEPS).is_file() else {}
    return used + ([(few["config"]["extractor"], few["model"]["extractor"])] if few else [])


def main(config: PackageConfig) -> dict[str, Any]:
    """Write the folder, whole or not at all, and its card; return what `results.json` holds."""
    check(config)
    output = Path(config.output)
    root = Path.cwd() if config.readme is None else Path(config.readme).resolve().parent
    inside = output.resolve().is_relative_to(root)
    name = output.resolve().relative_to(root).as_posix() if inside else output.name
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        aside = Path(scratch) / output.name
        pipe.save_pretrained(aside)
        joined = gather([Path(each) for each in config.records], aside, weights_digest(pipe.unet))
        write_json(aside / RESULTS, joined)
        for file, text in zip((HEADLINE, COMMANDS), headline(aside, name), strict=True):
            write_whole(aside / MEASURED / file, text)
        model = Model(aside, aside)
        for file in CONFIGS:  # as a push makes them: without the places they came from
            (aside / file).write_bytes(model.files[file])
        write_whole(aside / README, model.card(f"{config.user}/{output.name}", config.license, None, None))
        put_in_place(aside, output, overwrite=True)
    if config.readme is not None:
        text = Path(config.readme).read_text(encoding="utf-8")
        write_whole(Path(config.readme), fill(text, Path(config.readme).parent))
    return joined


def fill(text: str, root: Path) -> str:
    """A README with its marked blocks as the files say."""

    def filled(found: re.Match) -> str:
        return f"{found[1]}\n{(root / found[2]).read_text(encoding='utf-8').strip()}\n\n{found[3]}"

    return BLOCK.sub(filled, text)


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

    few = read(f"{MEASURED}/{FEW_STEPS}")
    goal = quality_of_1000(few, read(RESULTS)["results"]) if few else None
    if reached := goal and enough(few, goal):
        made_by = few["command"].replace(f"--model {few['config']['model']}", f"--model {name}")
        row(*reached, f"{MEASURED}/{FEW_STEPS}", made_by)
    found = read(f"{MEASURED}/reconstruct.json")
    of_ten = {each["refinement_steps"] > 0: each for each in found.get("table", ()) if each["S"] == 10}
    if len(of_ten) == 2:
        naive, refined = (f"{of_ten[kind]['mean_squared_error']:.1e}" for kind in (False, True))
        told = f"error for a dimension of held-out images encoded and decoded in ten steps, refined (plain: {naive})"
        settings = found["config"] | {"model": name, "spacing": found["spacing"]}
        made_by = command(build(reconstruct.ReconstructConfig, settings))
        row(refined, told, f"{MEASURED}/reconstruct.json", made_by)
    found = read(f"{MEASURED}/nll.json")
    if ode := found.get("cells", {}).get("ODE"):
        error = "" if ode["standard_error"] is None else f" ± {ode['standard_error']:.2f}"
        told = f"bits per dimension of {ode['images']} held-out images, by the ODE"
        made_by = command(build(nll.NLLConfig, found["config"] | {"model": name, "spacing": found["spacing"]}))
        row(f"{ode['bits']:.2f}{error}", told, f"{MEASURED}/nll.json", made_by)
    found = read("sample.json")
    settings = {key: value for key, value in found.get("settings", {}).items() if value is not None}
    if "cpus" in found and settings.keys() >= {"num", "steps"}:
        told = (
            f"seconds for {found['images']} images, S = {settings['steps']}, on {found['cpus']} CPU cores, with loading"
        )
        flags = {
            key: settings[key] for key in ("num", "steps", "seed", "eta", "spacing", "batch_size") if key in settings
        }
        words = [f"--{key.replace('_', '-')} {value}" for key, value in flags.items()]
        row(f"{found['seconds']:.1f}", told, "sample.json", " ".join(["ddim-plugin sample", name, *words]))
    table = "\n".join(["| | | |", "|---|---|---|", *rows]) if rows else "Nothing has been measured."
    return table + "\n", "\n".join(["```bash", *commands, "```"]) + "\n"


def quality_of_1000(few: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """The lowest Fréchet distance of 1000 steps that was measured, from the x_T of the first set at few steps."""
    sets = [_first(each) for each in few.get("thousand", ())]
    images = {each["images"] for row in few["rows"] for each in row["frechet"]}
    metric = f"fd_{slug(few['config']['extractor'])}"
    found = [
        each["value"]
        for each in results
        if each["metric"] == metric
        and each["nfe"] == 1000
        and {each["images"]} == images
        and each.get("seed") == few["config"]["seed"]
        and each.get("draws", 1) == 1
        and each["dataset"].get("split") == "train"
    ]
    return min(found + sets, default=None)


def _first(entry: dict[str, Any]) -> float:
    """The Fréchet distance of the first set."""
    return (entry.get("draws") or [entry["frechet"]])[0]


def enough(few: dict[str, Any], goal: float) -> tuple[str, str] | None:
    """The fewest evaluations with which ours has the quality of 1000, from the same x_T, and what is said of them.

    Where none has it, those that come nearest; None where ours was not measured.
    """
    found = []
    for row in few["rows"]:
        ours = [each for each in row["frechet"] if each["family"].startswith("ours")]
        if ours:
            value, family = min((_first(each), each["family"]) for each in ours)
            found.append((max(NEAR, value / goal), row["nfe"], value, family))
    if not found:
        return None
    ratio, nfe, value, family = min(found)
    reached = f"of 1000, within {NEAR - 1:.0%}" if ratio <= NEAR else "that comes nearest to that of 1000"
    known = few.get("relative_errors")
    error = f" ± {value / goal * known[1] * few['config']['draws'] ** 0.5:.2f}" if known else ""
    told = f"{value / goal:.2f}{error} times its Fréchet distance: {value:.3g}, {family}"
    return str(nfe), f"steps for the quality {reached} ({told}; the best of 1000 steps, from the same x_T: {goal:.3g})"


if __name__ == "__main__":
    try:
        done = main(parse(PackageConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"package.py: {error}")
    print(f"{len(done['results'])} figures and {len(done['pictures'])} pictures")
