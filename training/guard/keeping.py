"""What an output folder must leave alone: the data that are read, and the results of other scripts."""

import json
from pathlib import Path
from typing import Any

DATA = ("data", "eval_data", "fit_data", "reference")
"""Settings that name a data set."""

RESULTS = "results.json"


def check_data(config: Any) -> None:
    """Check that the output and the data of a script are apart: outputs would become data.

    Raises:
        ValueError: if one of them lies in the other.
    """
    output = Path(config.output).resolve()
    for name in filter(None, (getattr(config, each, None) for each in DATA)):
        data = Path(name).resolve()
        apart = not (output.is_relative_to(data) or data.is_relative_to(output))
        if name != "digits" and data.exists() and not apart:
            raise ValueError(f"the output {config.output} and the data {name} lie in one another: keep them apart")


def check_results(config: Any, script: str) -> None:
    """Check that `results.json` in the output is missing, or was written by this script.

    Args:
        config: settings; `overwrite` replaces a file that is not JSON.
        script: name of the script, without its ending.

    Raises:
        ValueError: if another script wrote the file, or it cannot be read.
    """
    file = Path(config.output) / RESULTS
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        writer = writer_of(found)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        if config.overwrite:
            return
        raise ValueError(f"cannot read {file} ({error}): choose another --output, or pass --overwrite") from error
    if writer != script:
        by = f"by {writer}.py" if writer else "by another program"
        raise ValueError(f"{file} was written {by}, and {script}.py would replace it: choose another --output")


def writer_of(found: dict[str, Any]) -> str:
    """Return the name of the script that wrote the content of a `results.json`; an empty one for other programs."""
    if "script" in found:
        return found["script"]
    if "references" in found:
        return "evaluate"
    metrics = {each["metric"] for each in found.get("results", ())}
    if "status" in found and all(each == "rms_to_solution" or each.startswith("fd_") for each in metrics):
        return "few_steps"
    if metrics == {"bits_per_dim"}:
        return "nll"
    if metrics and all(each.startswith("reconstruction_error_") for each in metrics):
        return "reconstruct"
    return ""
