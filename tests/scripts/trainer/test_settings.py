"""Settings from flags, files and defaults; the learning rate they give."""

from dataclasses import dataclass, field

import pytest
from trainer.config import SCHEDULES, TrainConfig, learning_rate
from trainer.settings import build, parse, read_toml
from training_runs import SMALL


def test_the_schedule_counts_optimiser_steps():
    def rates(**settings):
        config = build(TrainConfig, SMALL | {"output": "x", "steps": 10, "warmup_steps": 4} | settings)
        return [learning_rate(step, config) / config.learning_rate for step in range(1, 11)]

    assert rates()[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates() == [0.25, 0.5, 0.75] + [1.0] * 7
    assert rates(lr_schedule="linear")[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates(lr_schedule="cosine")[7] == pytest.approx(0.5)
    assert 0 < rates(lr_schedule="cosine")[9] < 0.1
    for schedule in SCHEDULES:
        assert rates(warmup_steps=0, lr_schedule=schedule)[0] == 1
        assert rates(warmup_steps=20, lr_schedule=schedule)[9] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('output = "x"\nlerning_rate = 0.1\n', "unknown settings: lerning_rate"),
        ("steps = = 3\n", "is not valid TOML"),
        ("steps = 3\n", "missing settings: output"),
        (None, "No such file"),
    ],
)
def test_bad_files(tmp_path, text, message, capsys):
    file = tmp_path / "settings.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parse(TrainConfig, ["--config", str(file)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@dataclass(frozen=True)
class Settings:
    """Settings of a test."""

    name: str = field(metadata={"help": "a name"})
    count: int = 3
    rate: float = 0.5
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    device: str | None = None
    table: dict = field(default_factory=dict)


def test_settings_come_from_flags_then_file_then_defaults(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text('name = "file"\ncount = 5\nrate = 2\nsizes = [7, 8]\n[table]\nkey = 1\n')
    settings = parse(Settings, ["--config", str(file), "--count", "9", "--flag", "--device", "cpu"])
    assert settings == Settings("file", 9, 2.0, True, (7, 8), "cpu", {"key": 1})
    assert parse(Settings, ["--name", "x", "--sizes", "4", "5"]) == Settings("x", sizes=(4, 5))
    assert build(Settings, {"name": "x", "device": None}) == Settings("x")
    assert read_toml(file)["table"] == {"key": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "missing settings: name"),
        ({"name": "x", "cuont": 1}, "unknown settings: cuont. Known: name, count"),
        ({"name": 3}, "name must be of type str, not 3"),
        ({"name": None}, "name must be of type str, not None"),
        ({"name": "x", "count": 1.5}, "count must be of type int, not 1.5"),
        ({"name": "x", "count": True}, "count must be of type int, not True"),
        ({"name": "x", "sizes": 3}, "sizes must be of type tuple, not 3"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        build(Settings, values)
