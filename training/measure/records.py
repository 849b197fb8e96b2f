"""Read the records of a packaged model: the headline, and the commands that make its numbers again."""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from cards.records import RESULTS
from guard.reading import read_object
from trainer.settings import MACHINES

from .comparison.samplers import is_stock
from .comparison.tables import best
from .extractors import slug

MEASURED, COMMANDS = "measured", "commands.md"
"""Folder of a package for the scripts' own records and tables, and the file there with the commands."""

NEAR = 1.05
"""Ratio to the distance of 1000 steps up to which a distance counts as the same quality."""


class Row(NamedTuple):
    """A number of the headline, its meaning, the record that it is from, and the command that makes it again."""

    value: str
    meaning: str
    record: str
    command: str


def headline(folder: Path, name: str) -> tuple[str, str]:
    """Return four numbers in Markdown, each with its record, and the commands that make them again.

    `name` is the folder's name in links and commands. Numbers that were not measured are left out.
    """
    rows = [find(folder, name) for find in (_few_steps, _reconstruction, _likelihood, _sampling)]
    rows = [row for row in rows if row is not None]
    lines = [
        f"| **{row.value}** | {row.meaning} | [record]({name}/{row.record}), [command]({name}/{MEASURED}/{COMMANDS}) |"
        for row in rows
    ]
    table = "\n".join(["| | | |", "|---|---|---|", *lines]) if rows else "Nothing has been measured."
    return table + "\n", "\n".join(["```bash", *(row.command for row in rows), "```"]) + "\n"


def _read(file: Path) -> dict[str, Any]:
    """Read a record; an empty one if there is none."""
    return read_object(file) if file.is_file() else {}


def _few_steps(folder: Path, name: str) -> Row | None:
    """Return the row of the evaluations that suffice for the quality of 1000 steps.

    If 1000 steps were not measured on as many images, it is that of the distance to the solution in ten evaluations.
    None if neither was measured.
    """
    record = f"{MEASURED}/few_steps.json"
    found = _read(folder / record)
    goal = quality_of_1000(found, _read(folder / RESULTS)["results"]) if found else None
    reached = enough(found, goal) if goal else nearest(found) if found else None
    return Row(*reached, record, command_of(found, "few_steps", name)) if reached else None


def _reconstruction(folder: Path, name: str) -> Row | None:
    """Return the row of the reconstruction error at ten steps, if it was measured."""
    record = f"{MEASURED}/reconstruct.json"
    found = _read(folder / record)
    of_ten = {bool(each["refinement_steps"]): each for each in found.get("table", ()) if each["S"] == 10}
    if len(of_ten) < 2:
        return None
    naive, refined = (f"{of_ten[kind]['mean_squared_error']:.1e}" for kind in (False, True))
    meaning = f"error for a dimension of held-out images encoded and decoded in ten steps, refined (plain: {naive})"
    return Row(refined, meaning, record, command_of(found, "reconstruct", name))


def _likelihood(folder: Path, name: str) -> Row | None:
    """Return the row of the ODE's likelihood, if it was measured."""
    record = f"{MEASURED}/nll.json"
    found = _read(folder / record)
    ode = found.get("cells", {}).get("ODE")
    if not ode:
        return None
    error = "" if ode["standard_error"] is None else f" ± {ode['standard_error']:.2f}"
    meaning = f"bits per dimension of {ode['images']} held-out images, by the ODE"
    return Row(f"{ode['bits']:.2f}{error}", meaning, record, command_of(found, "nll", name))


def _sampling(folder: Path, name: str) -> Row | None:
    """Return the row of the time to sample, if it was measured."""
    found = _read(folder / "sample.json")
    settings = {key: value for key, value in found.get("settings", {}).items() if value is not None}
    if "cpus" not in found or not settings.keys() >= {"num", "steps"}:
        return None
    meaning = (
        f"seconds for {found['images']} images, S = {settings['steps']}, on {found['cpus']} CPU cores, with loading"
    )
    known = ("num", "steps", "seed", "eta", "spacing", "class_label", "guidance_scale", "batch_size")
    words = _flags({key.replace("_", "-"): settings[key] for key in known if key in settings})
    return Row(f"{found['seconds']:.1f}", meaning, "sample.json", " ".join(["ddim-plugin sample", name, *words]))


def command_of(found: dict[str, Any], script: str, model: str) -> str:
    """Return the command that makes a record again with the model of another folder.

    Records of version 0.1 may lack their command, or name a script by an earlier path: the settings are then read from
    the record, and the script is the one of today.
    """
    if "command" in found:
        words = shlex.split(found["command"])[2:]
    else:
        words = _flags(found["config"] | {"spacing": found["spacing"]})
    words[words.index("--model") + 1] = model
    return shlex.join(["python", f"training/{script}.py", *words])


def _flags(config: dict[str, Any]) -> list[str]:
    """Return the flags of all settings of a record, except those of the machine."""
    words = []
    for key, value in config.items():
        if key in MACHINES or value in (None, [], {}):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{key}")
        else:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def quality_of_1000(few: dict[str, Any], results: list[dict[str, Any]]) -> float | None:
    """Return the lowest Fréchet distance of 1000 steps, from the x_T of the first set at few steps."""
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


def nearest(few: dict[str, Any]) -> tuple[str, str] | None:
    """Return the distance of ours to the ODE's solution in ten evaluations, over diffusers' best, and its meaning."""
    distances = [each for row in few["rows"] if row["nfe"] == 10 for each in row.get("rms", ())]
    ours, theirs = best(distances, "rms", lambda family: not is_stock(family)), best(distances, "rms", is_stock)
    if not ours or not theirs:
        return None
    meaning = "times the distance to the ODE's solution that the best of diffusers' samplers has in ten evaluations"
    count = len({each["family"] for each in distances if is_stock(each["family"])})
    return f"{ours['rms'] / theirs['rms']:.2f}", f"{meaning} ({ours['family']}; {theirs['sampler']} of {count} kinds)"


def _first(entry: dict[str, Any]) -> float:
    """Return the Fréchet distance of the first set."""
    return (entry.get("draws") or [entry["frechet"]])[0]


def enough(few: dict[str, Any], goal: float) -> tuple[str, str] | None:
    """Return the fewest evaluations with which ours has the quality of 1000 from the same x_T, and their meaning.

    If none has it, those that come nearest. None if ours was not measured.
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
    of_goal = f"{value / goal:.2f}{error} times its Fréchet distance: {value:.3g}, {family}"
    return str(
        nfe
    ), f"steps for the quality {reached} ({of_goal}; the best of 1000 steps, from the same x_T: {goal:.3g})"
