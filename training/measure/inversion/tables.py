"""The table and the plot of round trips, from their record `inversion.json`."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]
MEANINGS = {
    "latents": "Root mean square error of latents (in brackets that of the median image)",
    "pixels": "Squared error for a dimension on [0, 1] (in brackets that of the median image)",
}


def table(result: dict[str, Any]) -> str:
    """Format the record in Markdown: a table of errors for each guidance, and one of images that failed."""
    columns = list(dict.fromkeys(row["inverse"] for row in result["rows"]))
    data, failure = Path(result["config"]["data"]).name, result["config"]["failure"]
    pictures = f"{result['images']} images of {data}, {result['config']['split']} split, τ {result['spacing']}"
    lines = [
        f"{MEANINGS[result['kind']]} after x_0 → x_T → x_0, and evaluations to encode an image. {pictures}. "
        "The last column is the error of the plain inverse over that of k = 0, which costs the same."
    ]
    for guidance in dict.fromkeys(row["guidance"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["guidance"] == guidance]
        lines += [""] if guidance is None else ["", f"Guidance {guidance:g}:", ""]
        lines += [_line(["S", *columns, "plain / k = 0"]), "|---" * (len(columns) + 2) + "|"]
        for S, of_S in _by_steps(rows).items():
            cells = [_cell(of_S[name]) if name in of_S else "" for name in columns]
            lines.append(_line([str(S), *cells, _ratio(of_S)]))
    counted = [name for name in columns if any("not_converged" in row for row in _of(result, name))]
    lines += [
        "",
        f"An image fails if its error is above {failure:g}. Of {result['images']} images: failed; not converged by the "
        f"report at tolerance {result['config']['tolerance']:g}; failed though converged (lost in silence).",
        "",
        _line(["guidance", "S", "plain", *counted]),
        "|---" * (len(counted) + 3) + "|",
    ]
    for guidance in dict.fromkeys(row["guidance"] for row in result["rows"]):
        for S, of_S in _by_steps([row for row in result["rows"] if row["guidance"] == guidance]).items():
            cells = [_counts(of_S.get(name)) for name in ("plain", *counted)]
            lines.append(_line(["" if guidance is None else f"{guidance:g}", str(S), *cells]))
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw errors against evaluations to encode an image, for each guidance and S."""
    from matplotlib.figure import Figure

    guidances = list(dict.fromkeys(row["guidance"] for row in result["rows"]))
    figure = Figure(figsize=(1.5 + 3.6 * len(guidances), 3.8), layout="constrained")
    for axes, guidance in zip(
        figure.subplots(1, len(guidances), sharey=True, squeeze=False)[0], guidances, strict=True
    ):
        for i, (S, of_S) in enumerate(_by_steps([r for r in result["rows"] if r["guidance"] == guidance]).items()):
            kinds = {"o-": [], "x": [of_S.get("plain")], "s": [of_S.get("diffusers, DDIM")]}
            kinds |= {"^": [of_S.get("diffusers, DPM-Solver++")]}
            kinds["o-"] = [row for row in of_S.values() if row["refinement_steps"] is not None]
            for style, name in zip(kinds, ("k = 0, 1, …", "plain", "diffusers, DDIM", "DPM-Solver++"), strict=True):
                points = [(row["evaluations"], row["error"]) for row in kinds[style] if row and row["error"]]
                label = f"S = {S}" if style == "o-" else name if i == 0 else None
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label, fillstyle="none")
        axes.set(xscale="log", yscale="log", xlabel="network evaluations to encode an image")
        axes.set_title("" if guidance is None else f"guidance {guidance:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel(MEANINGS[result["kind"]].split(" (")[0])
    figure.savefig(drawn := io.BytesIO(), dpi=110)
    Image.open(drawn).convert("RGB").quantize(64).save(path, "png", optimize=True)  # a third of the bytes


def _of(result: dict[str, Any], name: str) -> list[Row]:
    return [row for row in result["rows"] if row["inverse"] == name]


def _by_steps(rows: list[Row]) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["S"], {})[row["inverse"]] = row
    return found


def _cell(row: Row) -> str:
    if row["error"] is None:
        return f"not finite, {row['evaluations']:.0f}"
    return f"{row['error']:.1e} ({row['median']:.1e}), {row['evaluations']:.0f}"


def _ratio(of_S: dict[str, Row]) -> str:
    plain, first = (of_S.get(name, {}).get("error") for name in ("plain", "k = 0"))
    return f"{plain / first:.1f}" if plain and first else ""


def _counts(row: Row | None) -> str:
    if row is None:
        return ""
    return (
        f"{row['failed']}; {row['not_converged']}; {row['lost_in_silence']}"
        if "not_converged" in row
        else str(row["failed"])
    )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
