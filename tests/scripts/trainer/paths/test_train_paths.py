"""Training on the paths of flow matching and variance exploding."""

import math

import convert_checkpoint
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from trainer.config import TrainConfig
from trainer.settings import build
from trainer.setup import build_run
from training_runs import SMALL, UNET, WEIGHTS, fit, fit_whole_and_resumed

from ddim_plugin import GeneralizedDDIMPipeline
from ddim_plugin.process.paths import FlowMatching, VarianceExploding

FLOW = {"prediction_type": "flow_prediction"}
EXPLODING = {"prediction_type": "score", "sigma_min": 0.01, "sigma_max": 10.0}
EDM = {"prediction_type": "edm", "sigma_data": 0.5, "timestep_spacing": "karras"}
C_NOISE = math.log(0.002) / 4, math.log(80) / 4
FOURIER = UNET | {"time_embedding_type": "fourier"}


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"scheduler": FLOW | {"shift": 3.0}, "times": "logit_normal", "class_conditional": True}, FlowMatching),
        ({"scheduler": EXPLODING, "unet": FOURIER}, VarianceExploding),
        ({"scheduler": EDM, "loss": "edm", "times": "log_normal"}, VarianceExploding),
    ],
    ids=["flow", "exploding", "edm"],
)
def test_a_run_previews_resumes_and_samples(tmp_path, settings, path):
    settings |= {"preview_every": 6, "preview_images": 4, "preview_steps": 3, "eval_every": 6, "eval_images": 32}
    whole = fit_whole_and_resumed(tmp_path, **settings)
    assert (whole / "previews" / "step-00000006.png").is_file()
    pipe = GeneralizedDDIMPipeline.from_pretrained(whole)
    assert isinstance(pipe.scheduler.path, path)
    assert pipe.scheduler.config.prediction_type == settings["scheduler"]["prediction_type"]
    labels = {"class_labels": [1, 2], "guidance_scale": 2.0} if path is FlowMatching else {}
    images = pipe(2, 4, eta=0.5, generator=torch.Generator().manual_seed(0), output_type="pt", **labels).images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1
    checkpoint = {"checkpoint": str(tmp_path / "whole" / "checkpoints" / "step-00000006")}
    convert_checkpoint.main(build(convert_checkpoint.ConvertConfig, checkpoint | {"output": str(tmp_path / "made")}))
    made = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "made")
    assert made.scheduler.config == pipe.scheduler.config
    assert torch.equal(made.unet.conv_in.weight, pipe.unet.conv_in.weight)
    frozen = "time_proj.weight"
    weights = [load_file(tmp_path / "whole" / name) for name in WEIGHTS]
    assert "unet" not in settings or torch.equal(weights[0][frozen], weights[1][frozen])


@pytest.mark.parametrize(
    ("scheduler", "seen"),
    [
        (FLOW, (1, 1000)),
        (EXPLODING, (0.01, 10.0)),
        (EXPLODING | {"prediction_type": "epsilon"}, (0.01, 10.0)),
        (EDM, C_NOISE),
    ],
)
def test_the_network_sees_the_timesteps_of_the_path(tmp_path, scheduler, seen):
    """Timesteps, noise levels and the range of pictures are those of sampling."""
    run = build_run(build(TrainConfig, SMALL | {"output": str(tmp_path / "x"), "scheduler": scheduler}))
    t = torch.tensor([1, run.objective.T])
    assert run.objective.timesteps(t).tolist() == pytest.approx(seen)
    images = run._to_model(torch.tensor([0, 255], dtype=torch.uint8))
    assert tuple(images.tolist()) == run.scheduler.image_range
    x0 = torch.zeros(2, 1, 8, 8)
    made = run.objective.noised(x0, x0 + 1, t).x[:, 0, 0, 0]
    assert made.tolist() == pytest.approx([run.scheduler.path.level(int(time)).noise for time in t])
    run.scheduler.set_timesteps(timesteps=[float(run.objective.timesteps(t)[1])])
    assert run.scheduler.timesteps.item() == pytest.approx(seen[1])


def test_previews_of_exploding_pictures_are_in_their_range(tmp_path):
    """The mean of a picture: a network that gives the exact score of one gray level leads there."""
    run = build_run(build(TrainConfig, SMALL | {"output": "x", "scheduler": EXPLODING, "unet": FOURIER}))
    pipe = run.pipeline()

    def network(x, t, class_labels=None):
        return type("Output", (), {"sample": (0.7 - x) / torch.as_tensor(t).view(-1, 1, 1, 1).to(x) ** 2})

    pipe.unet.forward = network
    image = pipe(1, 20, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert np.allclose(image, 0.7, atol=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"times": "logit_normal"}, "are those of flow matching"),
        ({"times": "log_normal"}, "are those of variance exploding"),
        ({"scheduler": EDM, "times": "log_normal", "loss": "theorem1"}, "needs times without preference"),
        ({"loss": "edm"}, "weights by sigma_data"),
        ({"scheduler": EDM, "unet": FOURIER}, "which must be σ: set sigma_min and sigma_max, and no sigma_data"),
        ({"scheduler": FLOW | {"use_dynamic_shifting": True}}, "use shift"),
        ({"scheduler": FLOW | {"shift": 3.0}, "times": "importance"}, "so shift=3 has no effect"),
        ({"scheduler": FLOW, "times": "logit_normal", "loss": "bound"}, "needs times without preference"),
        ({"scheduler": FLOW | {"shift": 2.0}, "loss": "theorem1"}, "needs times without preference"),
        ({"scheduler": FLOW, "loss": "min_snr"}, "gives time T the weight 0 at zero terminal SNR"),
        ({"scheduler": FLOW, "unet": FOURIER}, "which must be σ: set sigma_min and sigma_max, and no sigma_data"),
        ({"unet": FOURIER}, "which must be σ: set sigma_min and sigma_max, and no sigma_data"),
        ({"scheduler": EXPLODING, "loss": "bound"}, "has the prior N"),
        ({"scheduler": {"prediction_type": "epsilon", "use_flow_sigmas": True}}, "does not determine x0"),
        ({"scheduler": {"shift": 3.0}}, "shift"),
        ({"scheduler": EXPLODING | {"sigma_max": 0.001}}, "less than sigma_max"),
    ],
)
def test_paths_and_settings_that_contradict_each_other(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "run", **values)
    assert not (tmp_path / "run").exists()
