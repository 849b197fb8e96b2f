"""The headline of a package: numbers of its records, and the commands that make them again."""

import json

from measure.records import command_of, enough, headline, quality_of_1000

FEW = {
    "config": {"extractor": "a/resnet", "model": "out/m", "seed": 0},
    "command": "python tests/benchmarks/few_steps.py --model out/m",
    "rows": [
        {"nfe": nfe, "frechet": [{"family": family, "frechet": value, "images": 7} for family, value in found]}
        for nfe, found in (
            (5, [("ours", 3.0), ("ours, η = 1", 2.0), ("UniPC", 1.0)]),
            (8, [("ours", 1.1), ("ours, η = 1", 1.04)]),
            (10, [("ours", 1.0)]),
        )
    ],
}
THOUSAND = {"metric": "fd_resnet", "nfe": 1000, "seed": 0, "dataset": {"split": "train"}}
OTHERS = ({"images": 8}, {"images": 7, "seed": 1})
RESULTS = [THOUSAND | {"value": 1.0, "images": 7}, *(THOUSAND | {"value": 0.1} | other for other in OTHERS)]


def test_the_headline_has_the_steps_for_the_quality_of_1000(tmp_path):
    """And the script of today, where a record of version 0.1 names its path then."""
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "few_steps.json").write_text(json.dumps(FEW))
    (tmp_path / "results.json").write_text(json.dumps({"results": RESULTS}))
    table, commands = headline(tmp_path, "cards/out")
    assert table.splitlines()[2].startswith(
        "| **8** | steps for the quality of 1000, within 5% (1.04 times its Fréchet distance: 1.04, ours, η = 1;"
    )
    assert commands.splitlines()[1] == "python training/few_steps.py --model cards/out"


def test_without_1000_steps_it_has_the_distance_to_the_solution(tmp_path):
    distances = [("ours", 0.3), ("ours, fitted", 0.2), ("UniPC", 0.5), ("DEIS", 0.4)]
    rms = [{"family": family, "sampler": f"{family} 3", "rms": value} for family, value in distances]
    few = FEW | {"rows": [{"nfe": 10, "rms": rms, "frechet": FEW["rows"][2]["frechet"]}]}
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "few_steps.json").write_text(json.dumps(few))
    (tmp_path / "results.json").write_text('{"results": []}')
    row = headline(tmp_path, "cards/out")[0].splitlines()[2]
    assert row.startswith(
        "| **0.50** | times the distance to the ODE's solution that the best of diffusers' samplers has"
    )
    assert "in ten evaluations (ours, fitted; DEIS 3 of 2 kinds) |" in row


def test_nothing_was_measured(tmp_path):
    assert headline(tmp_path, "x") == ("Nothing has been measured.\n", "```bash\n```\n")


def test_a_record_is_made_again_by_its_command():
    """With the model in its new folder; by its settings where version 0.1 kept no command."""
    found = {"command": "python training/nll.py --model 'out/my model' --steps 10 50 --no-ode"}
    again = command_of(found, "nll", "cards/out")
    assert again == "python training/nll.py --model cards/out --steps 10 50 --no-ode"
    config = {"model": "out/m", "output": "out/n", "steps": [10, 50], "spacing": None, "ode": False, "searched": True}
    config |= {"clip": None, "device": "cpu", "batch_size": 3, "overwrite": True, "families": []}
    again = command_of({"config": config, "spacing": "linear"}, "nll", "cards/out")
    assert again == (
        "python training/nll.py --model cards/out --output out/n --steps 10 50 --spacing linear --no-ode --searched"
    )


def test_the_steps_for_the_quality_of_1000_are_counted_among_as_many_pictures():
    goal = quality_of_1000(FEW, RESULTS)
    assert goal == 1.0
    few = FEW | {"relative_errors": [0.1, 0.2]}
    few["config"] = FEW["config"] | {"draws": 4}
    assert enough(few, goal) == (
        "8",
        "steps for the quality of 1000, within 5% (1.04 ± 0.42 times its Fréchet distance: 1.04, ours, η = 1; "
        "the best of 1000 steps, from the same x_T: 1)",
    )
    assert enough(FEW, 0.96)[0] == "10"
    assert enough(FEW, 0.5) == (
        "10",
        "steps for the quality that comes nearest to that of 1000 (2.00 times its Fréchet distance: 1, ours; "
        "the best of 1000 steps, from the same x_T: 0.5)",
    )
    assert enough({"rows": [{"nfe": 5, "frechet": [{"family": "UniPC", "frechet": 1.0}]}]}, 1.0) is None
    means = THOUSAND | {"value": 0.1, "images": 7, "draws": 2}  # of several sets, whose first is told apart
    thousand = {"thousand": [{"frechet": 0.1, "draws": [0.9, -0.7]}]}
    assert quality_of_1000(FEW | thousand, [*RESULTS, means]) == 0.9
    assert quality_of_1000(FEW, RESULTS[1:]) is None
