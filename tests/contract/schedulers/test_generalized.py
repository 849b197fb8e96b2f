"""What the scheduler promises beyond its numbers: outputs, randomness, precision, settings, bad input."""

import copy
import pickle

import pytest
import torch
from plans import SHAPE, planned, tensors

from ddim_plugin import GeneralizedDDIMScheduler

# ---- outputs ---------------------------------------------------------------------------------------------------


def test_output_reads_like_those_of_diffusers():
    scheduler = planned(10, eta=1.0)
    out, x = tensors()
    result = scheduler.step(out, 599, x, generator=torch.Generator().manual_seed(1))
    assert result[0] is result.prev_sample is result["prev_sample"]
    assert result["pred_original_sample"] is result.pred_original_sample is result[1]
    assert [value.shape for value in result.to_tuple()] == [SHAPE, SHAPE, SHAPE, (), SHAPE]
    assert result[:2][1] is result.pred_original_sample
    with pytest.raises(AttributeError):
        result["logits"]
    again = scheduler.step(out, 599, x, generator=torch.Generator().manual_seed(1), return_dict=False)
    assert torch.equal(again[0], result.prev_sample)
    assert torch.equal(again[1], result.pred_original_sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
def test_mean_std_x0_and_eps_make_up_the_step(prediction_type, clip_sample):
    scheduler = planned(10, prediction_type=prediction_type, clip_sample=clip_sample, eta=0.8)
    out, x, z = tensors(3, dtype=torch.float64)
    result = scheduler.step(out, 599, x, variance_noise=z)
    assert torch.allclose(result.mean + result.std * z, result.prev_sample, atol=1e-14)
    a, b = scheduler.alpha_bar[600], scheduler.alpha_bar[500]
    rebuilt = b**0.5 * result.pred_original_sample + (1 - b - result.std**2) ** 0.5 * result.pred_epsilon
    assert torch.allclose(rebuilt, result.mean, atol=1e-12)
    if not clip_sample:
        assert torch.allclose(a**0.5 * result.pred_original_sample + (1 - a) ** 0.5 * result.pred_epsilon, x)


def test_log_probability_of_a_step():
    """Mean and σ are what policy gradients need: the density of x_s under them is that of z."""
    scheduler = planned(10, eta=1.0)
    out, x, z = tensors(3, dtype=torch.float64)
    result = scheduler.step(out, 599, x, variance_noise=z)
    density = torch.distributions.Normal(result.mean, result.std).log_prob(result.prev_sample)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z) - result.std.log()
    assert torch.allclose(density, expected)


def test_learned_variance():
    scheduler = planned(10, variance_type="learned_range")
    out, v, x, z = tensors(4, dtype=torch.float64)
    v = v.clamp(-1, 1)
    result = scheduler.step(torch.cat([out, v], dim=1), 599, x, variance_noise=z)
    small = planned(10, eta=1.0).step(out, 599, x, variance_noise=z)
    large = planned(10, variance_type="fixed_large").step(out, 599, x, variance_noise=z)
    expected = torch.exp((v + 1) / 2 * large.std.log() + (1 - v) / 2 * small.std.log())
    assert torch.allclose(result.std, expected)
    assert torch.allclose(result.mean, small.mean)
    assert torch.allclose(result.prev_sample, result.mean + expected * z)
    last = scheduler.step(torch.cat([out, v], dim=1), 99, x)
    assert torch.equal(last.prev_sample, last.mean)
    many = scheduler.step(torch.cat([out, v], dim=1), torch.tensor([599, 99, 700]), x, variance_noise=z)
    assert torch.allclose(many.prev_sample[0], result.prev_sample[0])
    assert torch.equal(many.std[1], torch.zeros_like(many.std[1]))
    scheduler.set_timesteps(10, eta=0.0)
    plain = scheduler.step(torch.cat([out, v], dim=1), 599, x)
    assert torch.equal(plain.prev_sample, planned(10).step(out, 599, x).prev_sample)


def test_kinds_of_noise_that_stand_at_eta_1():
    scheduler = planned(10, variance_type="fixed_large")
    out, x, z = tensors(3)
    own = scheduler.step(out, 599, x, variance_noise=z).prev_sample
    assert torch.equal(scheduler.step(out, 599, x, eta=1.0, variance_noise=z).prev_sample, own)
    assert torch.equal(scheduler.step(out, 599, x, eta=0.0, variance_noise=z).prev_sample, own)  # 0 is "not said"
    with pytest.raises(ValueError, match="'fixed_large' requires eta=1 .*not eta=0.5"):
        scheduler.step(out, 599, x, eta=0.5)
    scheduler.set_timesteps(10, eta=0)
    assert torch.equal(scheduler.step(out, 599, x).prev_sample, planned(10).step(out, 599, x).prev_sample)
    with pytest.raises(ValueError, match="'learned_range' requires eta=1 .*not eta=0.5"):
        GeneralizedDDIMScheduler(variance_type="learned_range", eta=0.5)


# ---- randomness ------------------------------------------------------------------------------------------------


def test_one_generator_an_image():
    """An image's noise depends on its own generator only, at any batch size and position."""
    scheduler = planned(10, eta=1.0)
    out, x = tensors()
    seeds = [7, 8, 9]

    def run(rows):
        generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
        return scheduler.step(out[rows], 599, x[rows], generator=generators).prev_sample

    together = run([0, 1, 2])
    assert torch.equal(run([2, 0]), together[[2, 0]])
    assert torch.equal(run([1]), together[[1]])


def test_bad_randomness():
    scheduler = planned(10, eta=1.0)
    out, x, z = tensors(3)
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        scheduler.step(out, 599, x, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match="must be a torch.Generator or a list of them, not 3"):
        scheduler.step(out, 599, x, generator=3)
    with pytest.raises(ValueError, match="either generator or variance_noise"):
        scheduler.step(out, 599, x, generator=torch.Generator(), variance_noise=z)
    with pytest.raises(ValueError, match=r"variance_noise has shape \(1, 1, 4, 4\)"):
        scheduler.step(out, 599, x, variance_noise=z[:1])


# ---- precision and devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"eta": 1.0}, {"clip_sample": True}, {"thresholding": True}])
def test_half_precision_is_one_rounding_away(dtype, config):
    scheduler = planned(1000, **config)
    out, x, z = tensors(3, dtype=dtype)
    noise = z if config.get("eta") else None
    for t in (999, 998, 500, 1, 0):
        half = scheduler.step(out, t, x, variance_noise=noise)
        full = scheduler.step(out.float(), t, x.float(), variance_noise=None if noise is None else noise.float())
        assert half.prev_sample.dtype == half.pred_original_sample.dtype == half.mean.dtype == dtype
        assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))
        assert torch.isfinite(half.prev_sample).all()
    for name in ("add_noise", "get_velocity"):
        half = getattr(scheduler, name)(x, z, torch.tensor([0, 500, 999]))
        assert torch.equal(half, getattr(scheduler, name)(x.float(), z.float(), torch.tensor([0, 500, 999])).to(dtype))


def test_steps_change_no_input_and_no_table():
    scheduler = planned(10, clip_sample=True, eta=1.0)
    out, x, z = tensors(3)
    kept = [value.clone() for value in (out, x, z, scheduler.alphas_cumprod)]
    scheduler.step(out, 599, x, variance_noise=z).to_tuple()
    scheduler.add_noise(x, z, torch.tensor([1, 2, 3]))
    for value, copy_of in zip((out, x, z, scheduler.alphas_cumprod), kept, strict=True):
        assert torch.equal(value, copy_of)


@pytest.mark.parametrize(
    "config", [{}, {"clip_sample": True, "clip_sample_range": 3.0}, {"eta": 1.0}, {"thresholding": True}]
)
def test_gradients_flow_through_a_step(config):
    scheduler = planned(10, **config)
    out, x, z = tensors(3, dtype=torch.float64)
    out.requires_grad_()
    noise = z if config.get("eta") else None

    def step(o):
        return scheduler.step(o, 599, x, variance_noise=noise, use_clipped_model_output=True).prev_sample

    assert torch.autograd.gradcheck(step, (out,))


def test_other_layouts():
    scheduler = planned(10)
    out, x = tensors(shape=(2, 3, 4, 6))
    expected = scheduler.step(out, 599, x).prev_sample
    last = torch.channels_last
    channels_last = scheduler.step(out.contiguous(memory_format=last), 599, x.contiguous(memory_format=last))
    assert torch.equal(channels_last.prev_sample, expected)
    strided = scheduler.step(out.mT.contiguous().mT, 599, x).prev_sample
    assert torch.equal(strided, expected)
    video = scheduler.step(out[:, :, None], 599, x[:, :, None]).prev_sample
    assert torch.equal(video[:, :, 0], expected)


def test_copies_and_pickles():
    scheduler = planned(10, eta=0.3)
    out, x, z = tensors(3)
    expected = scheduler.step(out, scheduler.timesteps[2], x, variance_noise=z).prev_sample
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.step(out, other.timesteps[2], x, variance_noise=z).prev_sample, expected)


# ---- bad input -------------------------------------------------------------------------------------------------


def test_bad_model_outputs():
    out, x = tensors()
    with pytest.raises(
        ValueError,
        match=r"shape \(2, 1, 4, 4\), and a sample of shape \(3, 1, 4, 4\) with 'fixed_small' needs the same",
    ):
        planned().step(out[:2], 599, x)
    with pytest.raises(ValueError, match="twice the channels need 'learned_range'"):
        planned().step(torch.cat([out, out], dim=1), 599, x)
    with pytest.raises(ValueError, match=r"shape \(3, 1, 4, 4\), .*'learned_range' needs twice the channels"):
        planned(variance_type="learned_range").step(out, 599, x)


@pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
def test_bad_marginals(name):
    scheduler = GeneralizedDDIMScheduler()
    x, z = tensors()
    call = getattr(scheduler, name)
    assert torch.equal(call(x, z, 5), call(x, z, torch.tensor([5, 5, 5])))
    with pytest.raises(ValueError, match=r"timestep .* is outside 0\.\.999"):
        call(x, z, torch.tensor([0, 1, 1000]))
    with pytest.raises(ValueError, match="must be integers"):
        call(x, z, torch.tensor([0.5, 1, 2]))
    with pytest.raises(ValueError, match=r"samples must be floating point, not torch\.uint8"):
        call(x.to(torch.uint8), z, 5)
    with pytest.raises(RuntimeError, match="broadcast"):
        call(x, z, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"timestep_spacing": "cosine"}, "unknown timestep_spacing for the path of a β schedule 'cosine'"),
        ({"variance_type": "huge"}, "unknown variance_type 'huge': use one of fixed_small, fixed_large, learned_range"),
        ({"beta_schedule": "cubic"}, "unknown beta_schedule 'cubic'"),
        ({"prediction_type": "noise"}, "unknown prediction_type 'noise'"),
        ({"eta": -0.1}, "eta must be a non-negative number, not -0.1"),
        ({"eta": float("nan")}, "eta must be a non-negative number, not nan"),
        ({"eta": "x"}, "eta must be a non-negative number, not 'x'"),
        ({"num_train_timesteps": 1000.0}, r"must be an integer of at least 1, not 1000\.0"),
        ({"num_train_timesteps": 10.0, "trained_betas": [0.1] * 10}, r"must be an integer of at least 1, not 10\.0"),
        ({"clip_sample": True, "clip_sample_range": None}, "clip_sample_range must be positive, not None"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1, not 0"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 entries, num_train_timesteps is 1000"),
        ({"steps_offset": -1}, "steps_offset must be an integer of at least 0, not -1"),
        ({"clip_sample": True, "clip_sample_range": 0.0}, "clip_sample_range must be positive, not 0.0"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, r"in \[0, 1\]"),
        ({"variance_type": "optimal"}, "needs eps_mean_square"),
        ({"variance_type": "optimal", "eps_mean_square": [0.5] * 10}, "must be 1000 finite non-negative numbers"),
        ({"variance_type": "optimal", "eps_mean_square": [float("nan")] * 1000}, "must be 1000 finite"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(ValueError, match=message):
        GeneralizedDDIMScheduler(**config)
