"""The notebook of the paper's figures: it runs on the committed model, and what it shows is true."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[3]
FILE = ROOT / "training" / "notebooks" / "tour.ipynb"
FIGURES = {"forward": 1, "sigma": 1, "eta": 1, "steps": 1, "time": 1, "codes": 2, "paths": 1, "solvers": 2, "stock": 1}
"""How many figures each cell draws."""

ANSWER = """
print(json.dumps({"errors": {kind: [errors[kind, S] for S in few] for kind in ("naive", "exact")},
                  "away": list(away.values()), "other": other, "solvers": to_solution,
                  "seconds": list(seconds.values()), "stock": type(stock.scheduler).__name__}))
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(FILE, as_version=4)


def executed(notebook):
    """Return the notebook after a run in its own folder, and what its variables then hold."""
    ran = nbformat.from_dict(notebook)
    ran.cells.append(nbformat.v4.new_code_cell(ANSWER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(
            ran, timeout=180, startup_timeout=180, resources={"metadata": {"path": str(FILE.parent)}}
        ).execute()
    answer = ran.cells.pop().outputs[-1].text
    return ran, json.loads(answer)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code] == ["model", *FIGURES]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert all(notebook.cells[i - 1].cell_type == "markdown" for i, cell in enumerate(notebook.cells) if cell in code)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for each in ("Eq. 4", "Eq. 16", "Table 1", "Fig. 5", "Fig. 4", "Table 2", "Fig. 6"):
        assert each in text


def test_it_runs_and_what_it_shows_is_true(notebook):
    """One test, since a run takes twenty seconds."""
    ran, found = executed(notebook)
    each_cell_draws(ran)
    it_shows_the_paper(found)
    it_shows_the_record_of_the_model(ran)


def each_cell_draws(ran):
    for cell in ran.cells:
        if cell.cell_type == "code":
            assert cell.execution_count
            drawn = [each for each in cell.outputs if "image/png" in each.get("data", {})]
            assert len(drawn) == FIGURES.get(cell.id, 0), cell.id
            assert all(len(each.data["image/png"]) > 5000 for each in drawn)


def it_shows_the_paper(found):
    errors = found["errors"]
    assert len(errors["naive"]) == 3
    assert all(exact < naive / 100 for exact, naive in zip(errors["exact"], errors["naive"], strict=True))
    assert errors["naive"] == sorted(errors["naive"], reverse=True)
    assert found["away"] == sorted(found["away"], reverse=True)
    assert found["away"][2] < found["other"] / 2
    solvers = found["solvers"]
    for S in range(3):  # at 5, 8 and 10; at 20 the fitted solver is as good as the other
        assert solvers["multistep, fitted"][S] < solvers["multistep"][S] < solvers["DDIM"][S]
    assert len(found["seconds"]) > 3
    assert all(each > 0 for each in found["seconds"])
    assert found["stock"] == "MultistepDDIMScheduler"


def it_shows_the_record_of_the_model(ran):
    [cell] = [cell for cell in ran.cells if cell.id == "eta"]
    text = "".join(each.text for each in cell.outputs if each.output_type == "stream")
    table = (ROOT / "model_cards" / "ddim-mnist-28" / "measured" / "table1.json").read_text()
    found = json.loads(table)["results"]
    known = {f"{each['value']:.2f}" for each in found if each["dataset"]["split"] == "train"}
    shown = {
        word for line in text.splitlines()[1:] for word in line.split() if "." in word and word not in ("0.2", "0.5")
    }
    assert shown == known


@pytest.mark.parametrize("folder", ["training/notebooks", "."])
def test_it_finds_the_model_from_there(notebook, folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    names = {}
    exec(notebook.cells[1].source, names)
    assert names["model"] == ROOT / "model_cards" / "ddim-mnist-28"
    assert names["pipe"].unet.config.sample_size == 28
