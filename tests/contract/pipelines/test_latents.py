"""Latents: encode, decode, reconstruct and interpolate, their reports, and what they refuse."""

import json

import diffusers
import numpy as np
import pytest
import torch
from exact import exact_pipe
from oracle import Mixture, alphas, linear_betas
from PIL import Image

from ddim_plugin import GeneralizedDDIMScheduler, InverseDDIMScheduler
from ddim_plugin.process.inversion import MOST_ROUNDS

ALPHA = alphas(linear_betas())
MIXTURE = Mixture((0.3, 0.7), (-0.6, 0.5), (0.02, 0.03), ALPHA)


@pytest.fixture
def mixture():
    return exact_pipe(MIXTURE, GeneralizedDDIMScheduler(), dtype=torch.float32)


def pictures(B=3, size=4, channels=1, seed=0):
    return 0.2 + 0.6 * torch.rand(B, channels, size, size, generator=torch.Generator().manual_seed(seed))


# ---- decode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 7, 1000])
@pytest.mark.parametrize("scheduler", [{}, {"timestep_spacing": "paper_quadratic"}, {"clip_sample": True}])
def test_decode_is_the_plain_sampler_bit_for_bit(S, scheduler):
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(**scheduler), dtype=torch.float32)
    z = torch.randn(2, 1, 4, 4)
    sampled = pipe(latents=z, num_inference_steps=S, output_type="latent").images
    assert torch.equal(pipe.decode(z, num_inference_steps=S, output_type="latent"), sampled)
    if not scheduler.get("clip_sample"):
        pipe.encode(pictures(2), num_inference_steps=7, refinement_steps=3)
        assert torch.equal(pipe.decode(z, num_inference_steps=S, output_type="latent"), sampled)


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_output_types(make_pipe, kind):
    pipe = make_pipe(channels=3)
    z = torch.randn(2, 3, 8, 8)
    made = pipe.decode(z, num_inference_steps=3, output_type=kind)
    again = pipe.reconstruct(pictures(2, 8, 3), num_inference_steps=3, output_type=kind)
    if kind == "pil":
        assert [image.size for image in made] == [image.size for image in again] == [(8, 8)] * 2
    else:
        assert made.shape == again.shape == ((2, 8, 8, 3) if kind == "np" else (2, 3, 8, 8))


# ---- encode ----------------------------------------------------------------------------------------------------


def test_images_of_any_kind_encode_alike(make_pipe):
    pipe = make_pipe(channels=3)
    array = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    expected = pipe.encode(array, num_inference_steps=5)
    assert expected.shape == (2, 3, 8, 8)
    assert expected.dtype == torch.float32
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    for images in ([Image.fromarray(image) for image in array], tensor, tensor / 255, array / 255, list(array)):
        assert torch.allclose(pipe.encode(images, num_inference_steps=5), expected, atol=1e-4)
    alone = pipe.encode(Image.fromarray(array[0]), num_inference_steps=5)
    assert torch.allclose(alone, expected[:1], atol=1e-4)


@pytest.mark.parametrize("refinement_steps", [None, 0, 8])
def test_a_batch_gives_what_each_gives_alone(mixture, refinement_steps):
    images = pictures(5)
    settings = {"num_inference_steps": 10, "refinement_steps": refinement_steps}
    together, report = mixture.encode(images, return_report=True, **settings)
    for i in range(5):
        alone, own = mixture.encode(images[i], return_report=True, **settings)
        assert torch.allclose(alone[0], together[i], atol=1e-5)
        assert own.total_evaluations[0] == report.total_evaluations[i]
    assert torch.allclose(mixture.encode(images.flip(0), **settings).flip(0), together, atol=1e-5)


SPACINGS = ["linear", "quadratic", "paper_linear", "paper_quadratic", "leading"]


@pytest.mark.parametrize(
    ("spacing", "times"),
    [(spacing, {"num_inference_steps": 7}) for spacing in SPACINGS]
    + [("paper_quadratic", {"num_inference_steps": 1}), ("linear", {"timesteps": [900, 500, 100, 0]})],
)
def test_any_tau_closes(spacing, times):
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(timestep_spacing=spacing))
    images = pictures()
    again, _, report = pipe.reconstruct(
        images, refinement_steps=60, tolerance=1e-9, output_type="pt", return_report=True, **times
    )
    assert torch.allclose(again.float(), images, atol=1e-6), str(report)
    assert report.converged.all()


def test_the_network_is_called_at_the_upper_end_of_each_move(make_pipe, monkeypatch):
    pipe = make_pipe()
    seen = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, **kw: seen.append(int(t)) or forward(x, t, **kw))
    rounds = {249: 8, 499: 2, 749: 1, 999: 1}  # steps near the data are harder
    for k, expected in (
        (None, [249, 499, 749, 999]),
        (0, [249, 249, 499, 749]),  # as many: that of the last step goes to the first
        (2, [t for t, each in rounds.items() for _ in range(3 * each)]),
    ):
        seen.clear()
        pipe.encode(pictures(1, 8), num_inference_steps=4, refinement_steps=k, tolerance=0)
        assert seen == expected


def test_with_set_alpha_to_one_false_the_move_to_the_data_may_be_none(mixture):
    mixture.scheduler = GeneralizedDDIMScheduler(set_alpha_to_one=False, timestep_spacing="leading")
    images = pictures()
    again, _, report = mixture.reconstruct(images, 5, 30, output_type="pt", return_report=True)
    assert report.residual[0] == pytest.approx(0, abs=1e-7)
    assert torch.allclose(again, images, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("refinement_steps", [None, 0, 20])
def test_all_predictions(make_unet, prediction_type, refinement_steps):
    """A network that predicts x0 or v, made from one that predicts ε: the same code."""
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(prediction_type=prediction_type))
    forward = pipe.unet.forward

    def other(x, t, class_labels=None):
        output = forward(x, t)
        a = ALPHA[int(t) + 1]
        x0 = (x - (1 - a) ** 0.5 * output.sample) / a**0.5
        if prediction_type == "sample":
            output.sample = x0
        if prediction_type == "v_prediction":
            output.sample = a**0.5 * output.sample - (1 - a) ** 0.5 * x0
        return output

    pipe.unet.forward = other
    images = pictures()
    error = (pipe.reconstruct(images, 50, refinement_steps, output_type="pt") - images).abs().max()
    assert error < (1e-4 if refinement_steps else 0.3)


def test_learned_variance_networks_encode(make_pipe):
    pipe = make_pipe(GeneralizedDDIMScheduler(variance_type="learned_range"), out_channels=2)
    images = pictures(2, 8)
    z = pipe.encode(images, num_inference_steps=5, refinement_steps=3)
    assert z.shape == (2, 1, 8, 8)
    sampled = pipe(latents=z, num_inference_steps=5, eta=0.0, output_type="pt").images
    assert torch.equal(pipe.decode(z, num_inference_steps=5, output_type="pt"), sampled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """The state stays in float32; the network's rounding sets the floor."""
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(timestep_spacing="leading"), dtype)
    images = pictures(2)
    again, z, report = pipe.reconstruct(images, 10, 10, output_type="pt", return_report=True)
    assert z.dtype == torch.float32
    assert np.isfinite(report.residual).all()
    naive = pipe.reconstruct(images, 10, None, output_type="pt")
    assert (again - images).pow(2).mean() < 0.01 * (naive - images).pow(2).mean()
    assert (again - images).abs().max() < 0.05


# ---- labels and guidance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_labels_and_guidance(guidance_scale):
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(timestep_spacing="leading"), num_class_embeds=4)
    images = pictures(2)
    settings = {"num_inference_steps": 10, "class_labels": [0, 2], "guidance_scale": guidance_scale}
    again, z, report = pipe.reconstruct(
        images, refinement_steps=50, tolerance=1e-9, output_type="pt", return_report=True, **settings
    )
    assert torch.allclose(again.float(), images, atol=1e-6), str(report)
    other = pipe.encode(images, 10, class_labels=[1, 3], guidance_scale=guidance_scale, refinement_steps=50)
    assert not torch.allclose(other, z, atol=1e-2)
    pipe.unet.evaluated = 0
    _, report = pipe.encode(images, refinement_steps=5, return_report=True, **settings)
    assert report.total_evaluations.sum() == pipe.unet.evaluated  # both halves of a guided one are counted


# ---- part of the way -------------------------------------------------------------------------------------------


def test_strength_stops_half_way(make_pipe):
    pipe = make_pipe()
    images = pictures(2, 8)
    for k in (1, None):
        z, report = pipe.encode(images, 10, strength=0.5, refinement_steps=k, return_report=True)
        assert report.timesteps.tolist() == [99, 199, 299, 399, 499]
    by_hand = pipe(latents=z, timesteps=[499, 399, 299, 199, 99], output_type="latent").images
    assert torch.equal(pipe.decode(z, 10, strength=0.5, output_type="latent"), by_hand)
    pipe.scheduler.set_timesteps(10)
    assert torch.equal(pipe(latents=z, timesteps=pipe.scheduler.timesteps[-5:], output_type="latent").images, by_hand)
    whole = pipe.encode(images, 10, refinement_steps=None)
    assert torch.equal(pipe.encode(images, 10, strength=1, refinement_steps=None), whole)
    assert not torch.allclose(z, whole)


def test_less_strength_keeps_more_of_the_image():
    """Image to image: encode with one label, decode with another."""
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(timestep_spacing="leading"), num_class_embeds=4)
    images = pictures(4)
    moved = []
    for strength in (0.1, 0.3, 0.6, 1.0):
        z = pipe.encode(images, 20, strength=strength, class_labels=0, refinement_steps=20)
        edited = pipe.decode(z, 20, strength=strength, class_labels=3, output_type="pt")
        moved.append(float((edited - images).abs().mean()))
    assert moved == sorted(moved)
    assert moved[0] < 0.6 * moved[-1]


@pytest.mark.parametrize("strength", [0.3, 0.29999999, 0.7])
def test_the_number_of_moves(make_pipe, strength):
    moves = {0.3: 3, 0.29999999: 2, 0.7: 7}[strength]
    _, report = make_pipe().encode(pictures(1, 8), 10, strength=strength, refinement_steps=None, return_report=True)
    assert len(report.timesteps) == moves
    _, report = make_pipe().encode(pictures(1, 8), 10, strength=strength, tolerance=0, return_report=True)
    assert report.total_evaluations.tolist() == [moves]  # for fewer steps: the last ones need none


# ---- the report ------------------------------------------------------------------------------------------------


def test_the_report_tells_what_was_spent_and_reached(mixture):
    images = pictures(3)
    mixture.unet.evaluated = 0
    z, report = mixture.encode(images, 10, refinement_steps=12, return_report=True)
    assert report.evaluations.shape == report.residual.shape == (10, 3)
    assert report.total_evaluations.sum() == mixture.unet.evaluated
    assert (report.evaluations[0] <= 13 * MOST_ROUNDS).all()
    assert (report.evaluations[1:] <= 13).all()
    assert report.timesteps.tolist() == [100 * i - 1 for i in range(1, 11)]
    assert np.array_equal(report.converged, report.residual <= 1e-5)
    assert report.latent_std == pytest.approx(z.flatten(1).std(1, unbiased=False).numpy(), rel=1e-4)
    assert report.latent_mean == pytest.approx(z.flatten(1).mean(1).numpy(), abs=1e-5)
    assert json.loads(json.dumps(report.to_dict()))["timesteps"] == report.timesteps.tolist()
    assert len(str(report).splitlines()) == 12


def test_the_residual_is_that_of_the_sampler(mixture, monkeypatch):
    """Measured again from the outside: one step of the scheduler from each x_t that was evaluated against x_s."""
    images, seen, forward = pictures(2), [], mixture.unet.forward
    settings = {"refinement_steps": 2, "tolerance": 0}
    below = mixture.encode(images, 10, strength=0.3, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(mixture.unet, "forward", lambda x, t, **kw: seen.append((int(t), x)) or forward(x, t, **kw))
        z, report = mixture.encode(images, 10, strength=0.4, return_report=True, **settings)
    mixture.scheduler.set_timesteps(10)

    def residual(x):
        step = mixture.scheduler.step(mixture.unet(x, 399).sample, 399, x).prev_sample
        return (below - step).pow(2).mean((1, 2, 3)).sqrt() / ALPHA[300] ** 0.5

    evaluated = torch.stack([residual(x) for t, x in seen if t == 399])
    assert len(evaluated) == 3
    assert evaluated.amin(0).numpy() == pytest.approx(report.residual[-1], rel=1e-3, abs=1e-7)
    assert (residual(z) < evaluated.amin(0)).all()  # what is returned comes after the last evaluation


def test_the_naive_report_measures_nothing(mixture):
    _, report = mixture.encode(pictures(2), 5, refinement_steps=None, return_report=True)
    assert np.isnan(report.residual).all()
    assert (report.evaluations == 1).all()
    assert not report.converged.any()
    assert report.to_dict()["residual"] == [[None, None]] * 5
    assert "nan" in str(report)


def test_a_picture_out_of_reach_does_not_converge(mixture):
    """The last move of a mixture without values near 0: gray lies outside the range of x̂0, and the report says so."""
    images = torch.full((1, 1, 4, 4), 0.45)
    images[0, 0, 0] = torch.rand(4)
    _, report = mixture.encode(images, timesteps=[999], refinement_steps=40, return_report=True)
    assert not report.converged.any()
    assert report.timesteps[~report.converged.all(1)].tolist() == [999]
    assert "not converged (1 of 1)" in str(report)


def test_a_tolerance_stops_early(mixture):
    images = pictures(2)
    spent = []
    for tolerance in (1e-2, 1e-3, 1e-5):
        _, report = mixture.encode(images, 10, refinement_steps=30, tolerance=tolerance, return_report=True)
        assert (report.residual <= tolerance).all()
        spent.append(report.total_evaluations.sum())
    assert spent == sorted(set(spent))


def test_refined_latents_decode_closer_with_a_real_network(make_pipe):
    """A U-Net without training makes large moves at high times hopeless: half of the way, and small outputs."""
    pipe = make_pipe(channels=3)
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    images = pictures(2, 8, 3)
    error = [
        float((pipe.reconstruct(images, 10, k, strength=0.5, output_type="pt") - images).pow(2).mean())
        for k in (None, 2, 8)
    ]
    assert error[1] < 0.5 * error[0]
    assert error[2] < 1e-8


# ---- interpolation ---------------------------------------------------------------------------------------------


def test_interpolation(mixture):
    z = torch.randn(2, 1, 4, 4)
    path = mixture.interpolate(z[0], z[1], num=11, num_inference_steps=5, output_type="pt")
    assert path.shape == (11, 1, 4, 4)
    ends = mixture.decode(z, num_inference_steps=5, output_type="pt")
    assert torch.allclose(path[[0, -1]], ends, atol=1e-5)
    in_parts = mixture.interpolate(z[0], z[1], 11, batch_size=4, num_inference_steps=5, output_type="pt")
    assert torch.allclose(in_parts, path, atol=1e-5)
    assert len(mixture.interpolate(z[:1], z[1:], num=2, num_inference_steps=2)) == 2
    assert mixture.interpolate(z[0], z[1], 3, batch_size=2, num_inference_steps=2, output_type="np").shape == (
        3,
        4,
        4,
        1,
    )


def test_several_paths_at_once(mixture):
    z0, z1 = torch.randn(2, 2, 1, 4, 4)
    both = mixture.interpolate(z0, z1, num=3, num_inference_steps=3, output_type="pt")
    one = mixture.interpolate(z0[1], z1[1], num=3, num_inference_steps=3, output_type="pt")
    assert torch.allclose(both[3:], one, atol=1e-5)


def test_the_grid_of_four_corners(mixture):
    corners = torch.randn(4, 1, 4, 4)
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    cells = mixture.interpolate_grid(corners, (3, 5), **settings).view(3, 5, 1, 4, 4)
    ends = mixture.decode(corners, **settings)
    assert torch.allclose(cells[[0, 0, -1, -1], [0, -1, 0, -1]], ends, atol=1e-5)
    top = mixture.interpolate(corners[0], corners[1], 5, **settings)
    left = mixture.interpolate(corners[0], corners[2], 3, **settings)
    assert torch.allclose(cells[0], top, atol=1e-5)
    assert torch.allclose(cells[:, 0], left, atol=1e-5)
    assert len(mixture.interpolate_grid(corners, 2, batch_size=3, num_inference_steps=1)) == 4


def test_labels_of_paths():
    pipe = exact_pipe(MIXTURE, GeneralizedDDIMScheduler(), num_class_embeds=4)
    z0, z1 = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    each = pipe.interpolate(z0, z1, 3, batch_size=2, class_labels=[1, 3], **settings)
    for i, label in ((0, 1), (1, 3)):
        one = pipe.interpolate(z0[i], z1[i], 3, class_labels=label, **settings)
        assert torch.allclose(each[3 * i : 3 * i + 3], one)
    with pytest.raises(ValueError, match="9 class_labels for a batch of 6"):
        pipe.interpolate(z0, z1, 3, class_labels=[1, 2, 3], **settings)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(make_pipe, monkeypatch):
    """A pipeline whose network must not be called."""
    pipe = make_pipe(channels=3)
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **kwargs: pytest.fail("the network was called"))
    return pipe


GOOD = {"images": torch.rand(2, 3, 8, 8), "num_inference_steps": 5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"images": torch.rand(2, 1, 8, 8)}, r"pass a tensor \(3, H, W\)"),
        ({"images": torch.rand(2, 3, 9, 8)}, "is 9×8 .* not 8×8 as the network is"),
        ({"images": torch.randn(2, 3, 8, 8)}, r"must lie in \[0, 1\]"),
        ({"images": []}, "an empty list of images"),
        ({"num_inference_steps": 0}, "must be an integer from 1 to 1000"),
        ({"num_inference_steps": 1001}, "must be an integer from 1 to 1000"),
        ({"num_inference_steps": None, "timesteps": [1, 5]}, "descending order"),
        ({"refinement_steps": -1}, "refinement_steps must be 0 or more, or None"),
        ({"refinement_steps": 2.5}, "refinement_steps must be 0 or more, or None"),
        ({"tolerance": -1e-3}, "tolerance must be a non-negative number"),
        ({"tolerance": float("nan")}, "tolerance must be a non-negative number"),
        ({"strength": 0}, r"strength must lie in \(0, 1\]"),
        ({"strength": 1.5}, r"strength must lie in \(0, 1\]"),
        ({"strength": 0.1}, "from 0.2 for 5 steps on, not 0.1"),
        ({"class_labels": 1}, "unconditional"),
        ({"guidance_scale": 2.0}, "unconditional"),
    ],
)
def test_bad_input_to_encode(untouched, call, message):
    for method in (untouched.encode, untouched.reconstruct):
        with pytest.raises(ValueError, match=message):
            method(**GOOD | call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"latents": torch.randn(2, 1, 8, 8)}, "latents have shape"),
        ({"latents": torch.randn(3, 8, 8)}, r"must be a torch tensor \(B, C, H, W\)"),
        ({"latents": "z"}, "latents must be a torch tensor .*, not"),
        ({"latents": torch.full((1, 3, 8, 8), float("inf"))}, "finite"),
        ({"strength": -1}, "strength must lie"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'"),
    ],
)
def test_bad_input_to_decode(untouched, call, message):
    with pytest.raises(ValueError, match=message):
        untouched.decode(**{"latents": torch.randn(2, 3, 8, 8), "num_inference_steps": 5} | call)


def test_bad_interpolations(untouched):
    z = torch.randn(4, 3, 8, 8)
    for call, message in (
        (lambda: untouched.interpolate(z[0], z[1], num=1), "num must be an integer of at least 2"),
        (lambda: untouched.interpolate(z[0], z[1], num=2.5), "num must be an integer"),
        (lambda: untouched.interpolate(z[:1], z[:2]), "two batches of one shape"),
        (lambda: untouched.interpolate(z[0], None), "latents must be a torch tensor .*, not"),
        (lambda: untouched.interpolate(z[0], z[1], batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: untouched.interpolate_grid(z[:3]), r"latents have shape \(3, .* need \(4, "),
        (lambda: untouched.interpolate_grid(z, (3, 1)), "num must be an integer of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (GeneralizedDDIMScheduler(eta=1.0), "latents need a deterministic, invertible process, not eta=1"),
        (
            GeneralizedDDIMScheduler(variance_type="fixed_large"),
            "not variance_type='fixed_large': .*config, variance_type='fixed_small'",
        ),
        (
            InverseDDIMScheduler(),
            "latents need a GeneralizedDDIMScheduler of ddim_plugin, not ddim_plugin.InverseDDIMScheduler",
        ),
        (
            diffusers.DDIMScheduler(),
            "need a GeneralizedDDIMScheduler of ddim_plugin, not diffusers.*: pipe.scheduler = ",
        ),
    ],
)
def test_schedulers_without_latents(untouched, scheduler, message):
    untouched.scheduler = scheduler
    z = torch.randn(1, 3, 8, 8)
    for call in (lambda: untouched.encode(**GOOD), lambda: untouched.decode(z), lambda: untouched.interpolate(z, z)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_constrained_moves_have_no_inverse(untouched, key):
    untouched.scheduler = GeneralizedDDIMScheduler(**{key: True})
    with pytest.raises(ValueError, match=f"invertible process, not {key}=True: .*{key}=False"):
        untouched.encode(**GOOD)


def test_the_remedies_in_the_messages_work(make_pipe):
    pipe = make_pipe()
    for scheduler in (GeneralizedDDIMScheduler(eta=1.0), diffusers.DDIMScheduler(clip_sample=False)):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match="pipe.scheduler = ") as error:
            pipe.encode(pictures(1, 8))
        exec(str(error.value).split(": ")[-1], {"pipe": pipe, "GeneralizedDDIMScheduler": GeneralizedDDIMScheduler})
        assert pipe.encode(pictures(1, 8), 3).shape == (1, 1, 8, 8)
