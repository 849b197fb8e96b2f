"""Pipelines on other paths than the paper's: flow matching, variance exploding, and x_t = x_0 + √t·ε."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDPMPipeline,
    DiffusionPipeline,
    ModelMixin,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddim_plugin import (
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    MultistepDDIMScheduler,
)

FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}
EXPLODING = {"prediction_type": "score", "sigma_max": 50.0}
ROOT = {"beta_schedule": "sqrt"}
FLOW_X0 = {"prediction_type": "sample", "use_flow_sigmas": True}
PATHS = {"flow": FLOW, "exploding": EXPLODING, "ε": EXPLODING | {"prediction_type": "epsilon"}, "root": ROOT}
every_path = pytest.mark.parametrize("settings", PATHS.values(), ids=PATHS)
accurate = pytest.mark.parametrize("settings", [FLOW, EXPLODING, PATHS["ε"]], ids=["flow", "exploding", "ε"])
both = pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])


class Exact(ModelMixin, ConfigMixin):
    """The best prediction for pixels of a normal distribution, on any path."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, out_channels=1, num_class_embeds=None):
        super().__init__()
        self.class_embedding = None
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, class_labels=None):
        path, x = self.scheduler.path, x.double()
        a, b = path.level(path.time(t.item()))
        x0 = self.mean + a * self.std**2 * (x - a * self.mean) / (a**2 * self.std**2 + b**2)
        eps = (x - a * x0) / b
        made = {"epsilon": eps, "score": -eps / b, "flow_prediction": eps - x0}
        return UNet2DOutput(sample=made[self.scheduler.config.prediction_type].float())


def exact(scheduler):
    """A pipeline of pictures with the mean 0.5 and the deviation 0.1 in [0, 1]."""
    network = Exact()
    low, high = scheduler.image_range
    network.scheduler, network.mean, network.std = scheduler, (low + high) / 2, (high - low) / 10
    pipe = GeneralizedDDIMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(B=3):
    return (0.5 + 0.1 * torch.randn(B, 1, 4, 4, generator=torch.Generator().manual_seed(0))).clamp(0.05, 0.95)


def seeds(number=2):
    return [torch.Generator().manual_seed(i) for i in range(number)]


# ---- sampling ------------------------------------------------------------------------------------------------------


@both
@accurate
def test_latents_are_noise_of_deviation_one(cls, settings):
    """The exact solution maps a latent z to the picture 0.5 + 0.1·z, but for the little that x_T knows of x_0."""
    pipe, z = exact(cls(**settings)), torch.randn(3, 1, 4, 4)
    made = pipe(latents=z, num_inference_steps=100, output_type="pt").images
    assert (made - (0.5 + 0.1 * z).clamp(0, 1)).abs().max() < 0.03
    assert torch.equal(pipe.decode(z, 100, output_type="pt"), made)
    again = pipe(3, 100, generator=seeds(3), output_type="np").images
    noise = torch.cat([torch.randn(1, 1, 4, 4, generator=each) for each in seeds(3)])
    assert np.allclose(again, pipe.decode(noise, 100, output_type="np"), atol=1e-6)
    assert pipe(latents=z, num_inference_steps=100, output_type="latent").images.shape == z.shape


@accurate
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noise_keeps_the_distribution(settings, eta):
    pipe = exact(GeneralizedDDIMScheduler(**settings))
    made = pipe(64, 100, eta=eta, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert abs(made.mean() - 0.5) < 0.02
    assert abs(made.std() - 0.1) < 0.02


def test_timesteps_may_be_real_numbers():
    flow, exploding = exact(GeneralizedDDIMScheduler(**FLOW)), exact(GeneralizedDDIMScheduler(**EXPLODING))
    for pipe, times in ((flow, [1000.0, 600.5, 33.3]), (exploding, [50.0, 3.25, 0.5])):
        images = pipe(timesteps=times, output_type="pt").images
        assert pipe.scheduler.timesteps.tolist() == pytest.approx(times)
        z = pipe.encode(images, timesteps=times, refinement_steps=20, tolerance=1e-6)
        assert torch.allclose(pipe.decode(z, timesteps=times, output_type="pt"), images, atol=1e-4)
    with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
        flow(num_inference_steps=2, timesteps=[1000.0, 600.5, 33.3])


STOCK = [diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)]
STOCK += [diffusers.FlowMatchLCMScheduler(shift=3.0)]
STOCK += [diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)]


@pytest.mark.parametrize("scheduler", STOCK, ids=lambda each: type(each).__name__)
def test_stock_schedulers_for_flow_matching_run_in_the_call(make_pipe, scheduler):
    pipe = make_pipe()
    pipe.scheduler = scheduler
    stock = pipe(2, 8, generator=seeds(), output_type="np").images
    pipe.scheduler = GeneralizedDDIMScheduler(**FLOW)
    assert np.isfinite(stock).all()
    if scheduler is STOCK[0]:
        assert np.abs(pipe(2, 8, generator=seeds(), output_type="np").images - stock).max() < 2e-6
        pipe.scheduler = scheduler
        pipe(timesteps=[1000.0, 500.0], output_type="pt")
        assert pipe.scheduler.timesteps.tolist() == [1000.0, 500.0]
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="latents need a GeneralizedDDIMScheduler"):
        pipe.encode(pictures())


def test_the_shift_for_the_size_of_the_image(make_pipe):
    pipe = exact(GeneralizedDDIMScheduler(use_dynamic_shifting=True, **FLOW))
    pipe(num_inference_steps=4, mu=1.0, output_type="pt")
    low = pipe.scheduler.timesteps
    pipe(num_inference_steps=4, mu=2.0, output_type="pt")
    assert (pipe.scheduler.timesteps[1:] > low[1:]).all()
    for scheduler in (GeneralizedDDIMScheduler(), diffusers.DDIMScheduler()):
        with pytest.raises(ValueError, match="mu"):
            make_pipe(scheduler)(mu=1.0)


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler])
def test_a_random_walk_is_sampled_and_encoded(make_pipe, make_unet, cls):
    pipe = make_pipe(cls(**ROOT), network(make_unet, ROOT))
    z = torch.randn(2, 3, 8, 8)
    made = pipe(latents=z, num_inference_steps=10, output_type="latent").images
    assert torch.equal(pipe.decode(z, 10, output_type="latent"), made)
    top = float(pipe.scheduler.sigmas[0])  # x_T has the level of the first step
    assert pipe.scheduler.init_noise_sigma == pytest.approx(top)
    images = torch.rand(2, 3, 8, 8)
    part = pipe.encode(images, 20, strength=0.5)
    encoded = pipe.encode(images, 20)
    assert pipe.decode(encoded, 20, output_type="pt").shape == images.shape
    assert part.std() > 5 * encoded.std()  # x_T is in units of √T


def test_the_corrector_is_for_samples_alone():
    pipe = exact(GeneralizedDDIMScheduler(corrector_steps=1, **EXPLODING))
    made = pipe(16, 50, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert len(pipe.scheduler.timesteps) == 100
    assert abs(made.std() - 0.1) < 0.03
    for method, value in ((pipe.decode, torch.randn(1, 1, 4, 4)), (pipe.encode, pictures(1))):
        with pytest.raises(ValueError, match=r"not corrector_steps=1: .*corrector_steps=0\)"):
            method(value)


# ---- latents -------------------------------------------------------------------------------------------------------


@both
@accurate
def test_images_encode_and_close(cls, settings):
    pipe, images = exact(cls(**settings)), pictures()
    z, report = pipe.encode(images, 20, refinement_steps=40, return_report=True)
    assert report.converged.all()
    assert report.latent_std == pytest.approx(z.flatten(1).std(1, correction=0).numpy(), rel=1e-4)
    assert torch.allclose(pipe.decode(z, 20, output_type="pt"), images, atol=1e-4)
    again, _, _ = pipe.reconstruct(images, 20, 40, output_type="pt", return_report=True)
    assert torch.allclose(again, images, atol=1e-4)
    z = pipe.encode(images, 200)
    assert (z - (images - 0.5) / 0.1).abs().mean() < 0.2  # noise of deviation 1, for many steps
    assert (pipe.decode(z, 200, output_type="pt") - images).abs().max() < 0.1


@accurate
def test_a_part_of_the_steps_gives_a_sample(settings):
    """x_t of its own deviation, not in units of x_T."""
    pipe, images = exact(GeneralizedDDIMScheduler(**settings)), pictures()
    x = pipe.encode(images, 100, strength=0.5, refinement_steps=40)
    start = pipe.scheduler.move(50).start
    low, high = pipe.scheduler.image_range
    deviation = (start.signal**2 * (0.1 * (high - low)) ** 2 + start.noise**2) ** 0.5
    assert float((x - start.signal * (low + high) / 2).std()) == pytest.approx(deviation, rel=0.25)
    assert torch.allclose(pipe.decode(x, 100, strength=0.5, output_type="pt"), images, atol=1e-4)


@every_path
def test_interpolations(settings):
    pipe, z = exact(GeneralizedDDIMScheduler(**settings)), torch.randn(4, 1, 4, 4)
    path = pipe.interpolate(z[0], z[1], num=3, num_inference_steps=20, output_type="pt")
    grid = pipe.interpolate_grid(z, num=2, num_inference_steps=20, output_type="pt")
    assert torch.allclose(path[[0, 2]], pipe.decode(z[:2], 20, output_type="pt"), atol=1e-5)
    assert torch.allclose(grid, pipe.decode(z, 20, output_type="pt"), atol=1e-5)
    assert path[1].std() > 0.7 * min(path[0].std(), path[2].std())  # slerp keeps the norm of noise


# ---- saving --------------------------------------------------------------------------------------------------------


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def settings_of(scheduler):
    """Settings of our class. Those that only the stock scheduler has are kept beside them."""
    return {key: scheduler.config[key] for key in inspect.signature(type(scheduler)).parameters}


def network(make_unet, settings, channels=3):
    kind = "fourier" if "sigma_max" in settings else "positional"
    unet = make_unet(channels=channels, time_embedding_type=kind)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    return unet


SAVED = {
    "flow": (FLOW, "DDPMPipeline", "FlowMatchEulerDiscreteScheduler"),
    "exploding": (EXPLODING, "ScoreSdeVePipeline", "ScoreSdeVeScheduler"),
    "root": (ROOT, "GeneralizedDDIMPipeline", "DDIMScheduler"),
    "x0": (FLOW_X0, "GeneralizedDDIMPipeline", "FlowMatchEulerDiscreteScheduler"),
    "ε": (PATHS["ε"], "GeneralizedDDIMPipeline", "ScoreSdeVeScheduler"),
}


@pytest.mark.parametrize("cls", [GeneralizedDDIMScheduler, MultistepDDIMScheduler, InverseDDIMScheduler])
@pytest.mark.parametrize("case", SAVED.values(), ids=SAVED)
def test_a_folder_restores_ours(make_unet, make_pipe, tmp_path, quiet_diffusers, cls, case):
    settings, pipeline, stock = case
    pipe = make_pipe(cls(**settings), network(make_unet, settings))
    pipe.save_pretrained(tmp_path)
    index = index_of(tmp_path)
    assert (index["_class_name"], index["scheduler"]) == (pipeline, ["diffusers", stock])
    assert index["_ddim_plugin"] == "GeneralizedDDIMPipeline"
    again = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is cls
    assert settings_of(again.scheduler) == settings_of(pipe.scheduler)
    if cls is not InverseDDIMScheduler:
        made = [each(2, 4, generator=seeds(), output_type="np").images for each in (pipe, again)]
        assert np.array_equal(*made)
    assert quiet_diffusers == []
    again.save_pretrained(tmp_path / "again")
    GeneralizedDDIMPipeline.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third")
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "third" / name).read_text()


def test_stock_readers_sample_a_flow_model_with_euler(make_unet, make_pipe, tmp_path, quiet_diffusers):
    pipe = make_pipe(GeneralizedDDIMScheduler(eta=0.4, **FLOW), network(make_unet, FLOW))
    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is DDPMPipeline
    assert type(stock.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    theirs = stock(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
    ours = pipe(2, 5, eta=0.0, generator=torch.Generator().manual_seed(0), output_type="np")
    assert np.abs(theirs.images - ours.images).max() < 2e-6
    assert quiet_diffusers == []
    stock.save_pretrained(tmp_path / "again")
    restored = GeneralizedDDIMPipeline.from_pretrained(tmp_path / "again").scheduler
    assert (type(restored), restored.config.eta) == (GeneralizedDDIMScheduler, 0.4)


def test_stock_readers_sample_an_exploding_model(make_unet, make_pipe, tmp_path):
    make_pipe(GeneralizedDDIMScheduler(**EXPLODING), network(make_unet, EXPLODING)).save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is ScoreSdeVePipeline
    assert (stock.scheduler.config.sigma_min, stock.scheduler.config.sigma_max) == (0.01, 50.0)
    assert stock(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", ["root", "x0", "ε"])
def test_stock_readers_refuse_what_they_cannot_sample(make_unet, make_pipe, tmp_path, name):
    settings = SAVED[name][0]
    make_pipe(GeneralizedDDIMScheduler(**settings), network(make_unet, settings)).save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute GeneralizedDDIMPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)
    if name == "root":
        with pytest.raises(NotImplementedError, match="sqrt is not implemented"):
            diffusers.DDIMPipeline.from_pretrained(tmp_path)


@pytest.fixture
def logged(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.name == "ddim_plugin"]


@pytest.mark.parametrize("in_one_folder", [False, True])
def test_a_checkpoint_of_ncsnpp_opens_and_goes_back(tmp_path, logged, in_one_folder):
    """The layout of google/ncsnpp: Fourier time, σ up to 1348, and a sampler of 4,000 evaluations."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "block_out_channels": (12, 20)}
    blocks |= {"up_block_types": ("SkipUpBlock2D",) * 2, "norm_num_groups": None}
    settings = {"time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5, "layers_per_block": 1}
    unet = UNet2DModel(8, 3, 3, **blocks, **settings, attention_head_dim=None)
    ScoreSdeVePipeline(unet, ScoreSdeVeScheduler(num_train_timesteps=2000, snr=0.15)).save_pretrained(tmp_path)
    if in_one_folder:
        for file in (*(tmp_path / "unet").iterdir(), *(tmp_path / "scheduler").iterdir()):
            file.rename(tmp_path / file.name)
        for name in ("unet", "scheduler"):
            (tmp_path / name).rmdir()
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    assert type(pipe.scheduler) is GeneralizedDDIMScheduler
    assert (config.prediction_type, config.sigma_max, config.num_train_timesteps) == ("score", 1348.0, 2000)
    assert logged()[0].startswith("The ScoreSdeVeScheduler of this ScoreSdeVePipeline became a GeneralizedDDIMSched")
    assert pipe(2, 20, generator=seeds(), output_type="np").images.shape == (2, 8, 8, 3)
    assert pipe.scheduler.timesteps[0] == 1348.0
    assert len(pipe.scheduler.timesteps) == 20

    pipe.save_pretrained(tmp_path / "again")
    stock = ScoreSdeVePipeline.from_pretrained(tmp_path / "again")
    stock.set_progress_bar_config(disable=True)
    first = ScoreSdeVePipeline.from_pretrained(tmp_path)
    first.set_progress_bar_config(disable=True)
    assert stock.scheduler.config.snr == 0.15
    made = [each(num_inference_steps=3, generator=seeds(1)[0], output_type="np").images for each in (stock, first)]
    assert np.array_equal(*made)


def test_a_stock_flow_model_opens_as_flow(make_unet, tmp_path, logged):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock = DDPMPipeline(network(make_unet, FLOW), scheduler)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    pipe = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.shift) == ("flow_prediction", 3.0)
    assert logged()[0].startswith("The FlowMatchEulerDiscreteScheduler of this DDPMPipeline became a Generalized")
    theirs = stock(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
    ours = pipe(2, 5, generator=torch.Generator().manual_seed(0), output_type="np")
    assert np.abs(theirs.images - ours.images).max() < 2e-6


def test_a_stock_flow_scheduler_that_was_chosen_is_kept(make_pipe, tmp_path):
    pipe = make_pipe(channels=3)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe.save_pretrained(tmp_path)
    assert index_of(tmp_path)["_class_name"] == "DDPMPipeline"  # `DDIMPipeline` would replace the scheduler
    again = GeneralizedDDIMPipeline.from_pretrained(tmp_path).scheduler
    assert (type(again), again.config.shift) == (diffusers.FlowMatchEulerDiscreteScheduler, 2.0)
