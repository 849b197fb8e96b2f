"""InverseDDIMScheduler: in the stock loop, its config, and what it refuses."""

import json

import diffusers
import pytest
import torch
from plans import planned, settings

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, InverseDDIMScheduler


@pytest.mark.parametrize(
    ("S", "prediction_type"),
    [(S, "epsilon") for S in (1, 7, 50, 999, 1000)] + [(S, "v_prediction") for S in (2, 7, 50, 999, 1000)],
)
def test_the_stock_loop_encodes(network, S, prediction_type):
    """The plain inverse, up and down again with outputs remembered: the identity, whatever the network says."""
    down = GeneralizedDDIMScheduler(prediction_type=prediction_type)
    up = InverseDDIMScheduler.from_config(down.config, refinement_steps=None)
    up.set_timesteps(S)
    assert up.timesteps.tolist() == sorted(up.timesteps.tolist())
    x0 = x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for t in up.timesteps:
        outputs.append(network(x, t))
        x = up.step(outputs[-1], t, x).prev_sample
    assert torch.isfinite(x).all()
    down.set_timesteps(S)
    for t in down.timesteps:
        x = down.step(outputs.pop(), t, x).prev_sample
    assert torch.allclose(x, x0, atol=1e-9)


def test_a_stock_pipeline_runs_it(make_unet):
    pipe = diffusers.DDIMPipeline(make_unet(channels=3), diffusers.DDIMScheduler())
    pipe.scheduler = InverseDDIMScheduler()
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=5, output_type="np").images.shape == (1, 8, 8, 3)


def test_our_pipeline_runs_it(make_unet):
    unet = make_unet()
    pipe = GeneralizedDDIMPipeline(unet, InverseDDIMScheduler(refinement_steps=None))
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 1, 8, 8)
    z = pipe(latents=images * 2 - 1, num_inference_steps=7, output_type="latent").images
    encoder = GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler())
    encoder.set_progress_bar_config(disable=True)
    assert torch.equal(encoder.encode(images, num_inference_steps=7, refinement_steps=None), z)


def test_times_of_any_kind(network):
    """Elements, integers, one for each sample, and times off the plan: from the nearest one below."""
    up = InverseDDIMScheduler(refinement_steps=None)
    up.set_timesteps(4)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    out = network(x, 0)
    by_element = up.step(out, up.timesteps[1], x).prev_sample
    assert torch.equal(up.step(out, 499, x).prev_sample, by_element)
    assert torch.equal(up.step(out, torch.tensor(499), x).prev_sample, by_element)
    each = up.step(out, torch.tensor([499, 249]), x).prev_sample
    assert torch.allclose(each[0], by_element[0])
    assert torch.allclose(each[1], up.step(out, 249, x).prev_sample[1])
    fine = InverseDDIMScheduler(refinement_steps=None)
    fine.set_timesteps(timesteps=[599, 499])
    assert torch.allclose(up.step(out, 599, x).prev_sample, fine.step(out, 599, x).prev_sample)


@pytest.mark.parametrize("kind", ["element", "integer"])
def test_repeated_times_move_once(network, kind):
    """paper_quadratic names some times twice: one step moves, the other stays."""
    up = InverseDDIMScheduler(timestep_spacing="paper_quadratic", refinement_steps=None)
    up.set_timesteps(50)
    times = up.timesteps if kind == "element" else up.timesteps.tolist()
    x = torch.randn(1, 1, 4, 4)
    for i, t in enumerate(times):
        moved = up.step(network(x, t), t, x).prev_sample
        assert torch.equal(moved, x) is bool(i > 0 and times[i - 1] == t)
        x = moved


# ---- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"timestep_spacing": "quadratic", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "sigmoid", "timestep_spacing": "paper_linear"},
        {"clip_sample": True, "use_clipped_model_output": True, "clip_sample_range": 2.0},
        {"thresholding": True, "sample_max_value": 1.5},
        {"variance_type": "learned_range"},
        {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
    ],
)
def test_there_and_back(own, quiet_diffusers, tmp_path):
    sampler = GeneralizedDDIMScheduler(**own)
    up = InverseDDIMScheduler.from_config(sampler.config)
    assert not up.config.clip_sample
    assert not up.config.thresholding
    free = settings(sampler) | dict.fromkeys(("clip_sample", "thresholding", "use_clipped_model_output"), False)
    assert settings(GeneralizedDDIMScheduler.from_config(up.config)) == free  # it decodes what was encoded
    up.save_pretrained(tmp_path)
    loaded = InverseDDIMScheduler.from_pretrained(tmp_path)
    assert settings(loaded) == settings(up)
    for back in (
        GeneralizedDDIMScheduler.from_config(loaded.config),
        GeneralizedDDIMScheduler.from_pretrained(tmp_path),
    ):
        assert settings(back) == free
    sampler.save_pretrained(tmp_path / "sampler")
    assert settings(InverseDDIMScheduler.from_pretrained(tmp_path / "sampler")) == settings(up)
    again = InverseDDIMScheduler.from_config(up.config)
    assert settings(GeneralizedDDIMScheduler.from_config(again.config)) == free
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (saved["_class_name"], saved["_ddim_plugin"]["class"]) == ("DDIMScheduler", "InverseDDIMScheduler")
    assert quiet_diffusers == []


def test_by_way_of_a_stock_scheduler():
    sampler = GeneralizedDDIMScheduler(clip_sample=True, timestep_spacing="quadratic")
    stock = diffusers.DDIMScheduler.from_config(InverseDDIMScheduler.from_config(sampler.config).config)
    assert stock.config.clip_sample is False
    expected = settings(GeneralizedDDIMScheduler(timestep_spacing="quadratic"))
    assert settings(GeneralizedDDIMScheduler.from_config(stock.config)) == expected
    up = InverseDDIMScheduler.from_config(diffusers.DDIMScheduler().config)  # which clips by default
    assert up.config.clip_sample is False


def test_clipping_where_it_is_asked_for(network):
    clipping = GeneralizedDDIMScheduler(clip_sample=True)
    free, asked = (
        InverseDDIMScheduler.from_config(clipping.config, refinement_steps=None),
        InverseDDIMScheduler.from_config(clipping.config, refinement_steps=None, clip_sample=True),
    )
    assert InverseDDIMScheduler(clip_sample=True).config.clip_sample
    assert InverseDDIMScheduler.from_config(asked.config).config.clip_sample
    x = 3 * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    made = {}
    for name, up in (("free", free), ("asked", asked)):
        up.set_timesteps(5)
        made[name] = up.step(network(x, 399), 399, x)
    assert made["free"].pred_original_sample.abs().max() > 1
    clipped = made["free"].pred_original_sample.clamp(-1, 1)
    assert torch.allclose(made["asked"].pred_original_sample, clipped)
    a = float(GeneralizedDDIMScheduler().alpha_bar[400])
    expected = a**0.5 * clipped + (1 - a) ** 0.5 * made["free"].pred_epsilon
    assert torch.allclose(made["asked"].prev_sample, expected, atol=1e-9)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own",
    [{"eta": 0.5}, {"eta": 1.0}, {"variance_type": "fixed_large"}, {"variance_type": "learned_range", "eta": 1.0}],
)
def test_noise_is_refused(own):
    with pytest.raises(ValueError, match="many x_t lead to one x_s"):
        InverseDDIMScheduler.from_config(GeneralizedDDIMScheduler(**own).config)
    with pytest.raises(ValueError, match="many x_t lead to one x_s"):
        InverseDDIMScheduler(**own)
    assert (
        InverseDDIMScheduler.from_config(
            GeneralizedDDIMScheduler(**own).config, eta=0.0, variance_type="fixed_small"
        ).config.eta
        == 0
    )


def test_noise_in_a_step_is_refused(network):
    up = InverseDDIMScheduler()
    up.set_timesteps(5)
    x = torch.randn(1, 1, 4, 4)
    assert up.step(network(x, 199), 199, x, eta=0.0, generator=torch.Generator()).std == 0
    for eta, message in (
        (0.3, "encoding is deterministic, and cannot use eta=0.3"),
        (-1, "eta must be"),
        ("1", "eta must be"),
    ):
        with pytest.raises(ValueError, match=message):
            up.step(network(x, 199), 199, x, eta=eta)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr(network, prediction_type):
    up = InverseDDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="does not depend on x_1000, so it has no inverse: use more steps"):
        up.set_timesteps(1)
    up.set_timesteps(5)
    x = torch.rand(2, 1, 4, 4)
    for t in up.timesteps:
        x = up.step(network(x, t), t, x).prev_sample
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(network, dtype):
    up = InverseDDIMScheduler()
    up.set_timesteps(5)
    x = torch.rand(2, 1, 4, 4)
    half, full = (up.step(network(y, 399), 399, y).prev_sample for y in (x.to(dtype), x.to(dtype).float()))
    assert half.dtype == dtype
    assert torch.allclose(half.float(), full, atol=0.05)


@pytest.mark.parametrize("timestep", [555, torch.tensor([99, 199])])
def test_an_exact_step_needs_its_plan(timestep):
    up, x = planned(10, InverseDDIMScheduler), torch.ones(2, 1, 2, 2)
    with pytest.raises(ValueError, match="is not in the plan, or not the same for all samples"):
        up.step(x, timestep, x)
