"""Settings of a grid: the presets are the paper's, and bad settings leave nothing behind."""

import pytest
from measure.extractors import INCEPTION
from measure.grid.cells import Cell, make_scheduler
from measure.grid.settings import EvaluateConfig, settle
from trainer.settings import build

from ddim_plugin import GeneralizedDDIMScheduler

FEATURES = 16


def test_presets_are_the_papers_settings():
    def settled(**values):
        return settle(build(EvaluateConfig, {"model": "m", "reference": "r"} | values))

    one, three = settled(table1=True), settled(table3=True)
    assert (one.steps, one.variances) == ((10, 20, 50, 100, 1000), ("0", "0.2", "0.5", "1", "fixed_large"))
    assert (one.images, one.extractors, one.metrics) == (50_000, (INCEPTION,), ("fd",))
    assert (one.spacings, three.spacings) == (("quadratic",), ("linear",))
    assert (three.steps, three.variances) == ((10, 20, 50, 100), ("0", "1"))
    assert settled(table1=True, steps=(10,), spacings=("linear",)).spacings == ("linear",)
    saved = GeneralizedDDIMScheduler(clip_sample=True)
    for config, clips in ((one, [False] * 4 + [True]), (three, [False] * 2)):
        cells = [Cell("GeneralizedDDIMScheduler", each, config.spacings[0], 10) for each in config.variances]
        made = [make_scheduler(cell, saved, config.clip)[0] for cell in cells]
        assert [scheduler.config.clip_sample for scheduler in made] == clips
    with pytest.raises(ValueError, match="choose one of"):
        settled(table1=True, table3=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": (2, 1001)}, r"S=1001 is more than T=1000"),
        ({"steps": (0,)}, "steps must be positive numbers"),
        ({"steps": (2, 2)}, "steps must be distinct"),
        ({"schedulers": ("DDIMScheduler",), "steps": (2000,)}, "DDIMScheduler, variance 0, S=2000: .*more than T=1000"),
        ({"schedulers": ("HeunDiscreteScheduler",)}, "knows no variance '0': measure HeunDiscreteScheduler:saved"),
        ({"schedulers": ("DDIMScheduler",), "spacings": ("quadratic",)}, "DDIMScheduler knows no spacing 'quadratic'"),
        ({"schedulers": ("UNet2DModel",)}, "unknown scheduler 'UNet2DModel'"),
        ({"spacings": ("cubic",)}, "cubic"),
        ({"variances": ("-0.5",)}, "unknown variance '-0.5': use a number"),
        ({"variances": ("learned_range",)}, "variance_type='learned_range' needs 2"),
        ({"variances": ("optimal",)}, "variance_type='optimal' needs eps_mean_square"),
        ({"clip": "sometimes"}, "unknown clip 'sometimes'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"metrics": ("fvd",)}, "unknown metric 'fvd': use some of fd, kid, is, pr"),
        ({"images": 0}, "images must be positive"),
        ({"images": FEATURES}, "16 pictures are too few for a Fréchet distance on 16 features: it needs at least 17"),
        ({"reference": "nowhere.parquet"}, "there is no file nowhere.parquet"),
        ({"splits": ("validation",)}, "has no split 'validation': it has train, test"),
        ({"model": "/nowhere"}, "there is no folder /nowhere"),
        ({"extractors": ("/nowhere",)}, "there is no folder /nowhere: an extractor is one of inception-v3-compat"),
    ],
)
def test_bad_settings_leave_nothing(measure, tmp_path, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        measure(**settings)
    assert not (tmp_path / "out").exists()
