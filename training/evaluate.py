"""Measure a model: pictures at any S, variance, τ and scheduler, and their distance from a data set (Tables 1 and 3).

python training/evaluate.py --model user/model --reference user/data --table1 --output out/table1
accelerate launch training/evaluate.py --model out/mnist --reference mnist --extractors my/classifier --images 10000

Picture i comes from the seed `seed + i`, for any batch size and number of processes. Start a run that was killed again
to continue it.
"""

import guard

if __name__ == "__main__":
    guard.start()  # before the imports that take seconds

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from guard.progress import Progress
from guard.writing import write_file
from measure.grid.cells import Cell
from measure.grid.figures import draw
from measure.grid.run import Run, summary
from measure.grid.settings import EvaluateConfig, settle
from measure.grid.tables import table
from trainer.settings import parse, write_json


@guard.output(alone=False, results="evaluate")
def main(config: EvaluateConfig) -> dict[str, Any]:
    """Measure all cells. Each finished cell updates results.json, and the last one makes tables and figures."""
    run = Run(settle(config))
    chief, output = run.state.is_main_process, run.output
    cost = run.estimate()
    if chief:
        print(describe_cost(cost, run.state.num_processes), flush=True)
    if run.config.estimate:
        return {"estimate": cost}
    output.mkdir(parents=True, exist_ok=True)
    run.cache.mkdir(parents=True, exist_ok=True)
    todo = run.todo()
    run.state.wait_for_everyone()  # all have looked before anyone writes
    against = [run.against(each) for each in run.extractors] if todo else []
    finished: dict[Cell, dict[str, Any]] = {}
    result: dict[str, Any] = {}
    mine = cost["evaluations"] / run.state.num_processes
    with Progress(mine, "evaluate", quiet=not chief) as bar, bar.counting(run.model.pipe.unet):
        for cell in sorted(run.grid, key=lambda cell: run.keys[cell] in todo):  # finished cells first
            new = todo.pop(run.keys[cell], None) is not None
            if new:
                with bar.part(run.evaluations(cell) / run.state.num_processes):
                    run.sample(cell)
            if chief:
                if new:
                    run.measure(cell, against)
                finished[cell] = run.finished(cell)
                if new:
                    bar.print(describe_cell(cell, finished[cell]))
                shutil.rmtree(run.parts(cell).folder, ignore_errors=True)
                result = summary(run, finished)
                write_json(output / "results.json", result)
            run.state.wait_for_everyone()
    if chief:
        write_file(output / "table.md", table(result))
        pictures = {cell: run.file(cell).with_suffix(".safetensors") for cell in run.grid}
        result["pictures"] = draw(result, pictures, output)
        write_json(output / "results.json", result)
        with suppress(OSError):
            (output / "parts").rmdir()
    run.state.wait_for_everyone()
    return result


def describe_cost(cost: dict[str, Any], processes: int) -> str:
    """Return the estimate as a line."""
    return (
        f"{cost['cells']} cells, of which {cost['finished']} are finished; for the others {cost['evaluations']:,} "
        f"evaluations of the network of {1000 * cost['seconds_an_evaluation']:.3g} ms: about {cost['hours']:.2g} h on "
        f"{processes} process{'es' if processes > 1 else ''}, and the references if they are not cached"
    )


def describe_cell(cell: Cell, finished: dict[str, Any]) -> str:
    """Return the results of a cell as a line."""
    values = []
    for each in finished["results"]:
        split = each["dataset"].get("split")
        values.append(f"{each['name']}{f' ({split})' if split else ''} {each['value']:.4g}")
    return f"{cell.scheduler}, {cell.label()}, S = {cell.steps}: " + "; ".join(values)


if __name__ == "__main__":
    with guard.program("The same command resumes the run"):
        done = main(parse(EvaluateConfig))
        if PartialState().is_main_process:
            for name in ("results.json", "table.md", *done["pictures"]) if "pictures" in done else ():
                print(Path(done["config"]["output"]) / name)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
