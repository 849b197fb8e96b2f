"""Put a trained model and its measurements into one folder that can be pushed as it is.

python training/package.py --model out/fitted/model --records out/mnist out/samples out/table1 out/table2 out/nll \
  --output model_cards/ddim-mnist-28
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cards.card import write_card
from cards.records import LOSS, RESULTS, SAMPLE, TRAINING, listed_pictures, public, read_results
from cards.weights import weights_digest
from guard.reading import read_object
from guard.writing import replace_folder, write_file
from measure.extractors import slug
from measure.records import COMMANDS, MEASURED, headline
from trainer.settings import parse, write_json

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.hub.card import is_written_here
from ddim_plugin.hub.push import GRID, README

HEADLINE = "headline.md"

BLOCK = re.compile(r"(<!-- (\S+\.md) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
"""A block of a README, which is filled with the text of the file that it names."""

HIGHER = ("is", "inception_score", "precision", "recall", "accuracy")
"""First words of the names of metrics of which higher values are better."""

WHOLE = ("nll", "reconstruct", "few_steps", "fit", "table2", "inversion", "gallery")
"""Names of records, as .json and .md. The records of evaluate.py take the name of their folder."""


@dataclass(frozen=True)
class PackageConfig:
    """Put a model, the record of its training and its measurements into one folder, with a card made of them."""

    model: str = field(metadata={"help": "a folder written by save_pretrained, the training, or ddim-plugin fit"})
    output: str = field(metadata={"help": "the folder to write; its name is that of the model"})
    records: tuple[str, ...] = field(
        metadata={
            "help": "what train.py, the scripts that measure, gallery.py, ddim-plugin fit and sample wrote for it"
        }
    )
    user: str = field(default="user", metadata={"help": "of the Hub, for the examples in the card"})
    readme: str | None = field(default=None, metadata={"help": "a file whose marked blocks to fill from the folders"})
    license: str | None = field(default=None, metadata={"help": "of the weights, as the Hub names it"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier package"})


def check(config: PackageConfig) -> None:
    """Check that folders can be read and written, and that a README can be filled. Raises ValueError if not."""
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
            raise ValueError(f"{output} is no package, or was changed since: choose another output")
    if config.readme is not None:
        root, made = Path(config.readme).parent, output.resolve()
        for _, name, _ in BLOCK.findall(Path(config.readme).read_text(encoding="utf-8")):
            if not (root / name).is_file() and made not in (root / name).resolve().parents:
                raise ValueError(f"{config.readme} has a block for {name}, which is not there")


@guard.output(alone=True, whole=True)
def main(config: PackageConfig) -> dict[str, Any]:
    """Write the folder and its card, completely or not at all. Returns the content of `results.json`."""
    check(config)
    output = Path(config.output)
    root = Path.cwd() if config.readme is None else Path(config.readme).resolve().parent
    inside = output.resolve().is_relative_to(root)
    name = output.resolve().relative_to(root).as_posix() if inside else output.name
    pipe = GeneralizedDDIMPipeline.from_pretrained(config.model)
    with replace_folder(output) as aside:
        pipe.save_pretrained(aside)
        joined = gather([Path(each) for each in config.records], aside, weights_digest(pipe.unet))
        write_json(aside / RESULTS, joined)
        for file, text in zip((HEADLINE, COMMANDS), headline(aside, name), strict=True):
            write_file(aside / MEASURED / file, text)
        write_card(aside, f"{config.user}/{output.name}", config.license)
    if config.readme is not None:
        text = Path(config.readme).read_text(encoding="utf-8")
        write_file(config.readme, fill(text, Path(config.readme).parent))
    return joined


def gather(folders: list[Path], output: Path, digest: str) -> dict[str, Any]:
    """Copy records, tables and pictures of the weights with this digest, and join the `results.json` of all folders.

    Raises:
        ValueError: if figures were measured on other weights, two files have one name, or two extractors have.
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

    drawn = [folder for folder in folders if (folder / SAMPLE).is_file()]  # their grid, not the last of the training
    for folder in folders:
        for name in (TRAINING, SAMPLE, LOSS, *([GRID] if folder in drawn or not drawn else [])):
            take(folder / name, output / name)
        for name in (*(f"{each}{kind}" for each in WHOLE for kind in (".json", ".md")), "inversion.png"):
            take(folder / name, output / MEASURED / name)
        for name, fingerprint in _extractors(folder):
            if extractors.setdefault(slug(name), fingerprint) != fingerprint:
                raise ValueError(f"{folder} was measured with another extractor {slug(name)} than a record before it")
        if not (folder / RESULTS).is_file():
            continue
        found = read_object(folder / RESULTS)
        if found.get("model", {}).get("sha256") != digest:
            raise ValueError(f"{folder / RESULTS} was measured on other weights than those of the model")
        if found.get("status", "finished") != "finished":
            raise ValueError(f"{folder / RESULTS} is of a run that is not finished: resume it, or ask for less")
        joined["results"] += public(read_results(folder / RESULTS))
        if "references" in found:  # of evaluate.py, which has no other record
            take(folder / RESULTS, output / MEASURED / f"{folder.name}.json")
            take(folder / "table.md", output / MEASURED / f"{folder.name}.md")
        for name, caption in listed_pictures(found.get("pictures", {}), folder / RESULTS).items():
            target = f"{folder.name}-{name}" if name in joined["pictures"] else name
            take(folder / name, output / target)
            joined["pictures"][target] = public(caption)
    list_best(joined["results"])
    return joined


def list_best(results: list[dict[str, Any]]) -> None:
    """Mark all entries but the best of each metric and data set as not listed on the Hub; the card has all."""
    best: dict[tuple, dict[str, Any]] = {}
    for entry in results:
        kind = (entry["metric"], entry["dataset"]["name"], entry["dataset"].get("split"))
        sign = -1 if entry["metric"].startswith(HIGHER) else 1
        if entry.get("listed", True):
            best[kind] = min(best.get(kind, entry), entry, key=lambda each, sign=sign: sign * each["value"])
    for entry in results:
        if not any(entry is each for each in best.values()):
            entry["listed"] = False


def _extractors(folder: Path) -> list[tuple[str, str]]:
    """Return names and fingerprints of the extractors that Fréchet distances in this folder were measured with."""
    found = read_object(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    used = [(each["name"], each["fingerprint"]) for each in found.get("extractors", ())]
    few = read_object(folder / "few_steps.json") if (folder / "few_steps.json").is_file() else {}
    return used + ([(few["config"]["extractor"], few["model"]["extractor"])] if few else [])


def fill(text: str, root: Path) -> str:
    """Return a README with the text of the files in its marked blocks."""

    def filled(found: re.Match) -> str:
        return f"{found[1]}\n{(root / found[2]).read_text(encoding='utf-8').strip()}\n\n{found[3]}"

    return BLOCK.sub(filled, text)


if __name__ == "__main__":
    with guard.program():
        given = parse(PackageConfig)
        done = main(given)
        print(f"{given.output}: the model, {len(done['results'])} figures and {len(done['pictures'])} pictures")
        if given.readme is not None:
            print(f"{given.readme}: its blocks")
