"""`fit_solver` in the loops of our pipeline and of stock ones: what it fits, leaves as it was, and refuses."""

import copy
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import tiny_flow_pipelines as flows
import tiny_pipelines as tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from exact import weighed
from tiny_pipelines import FAMILIES, SD

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.pipelines.fit import _distance, fit_solver
from ddim_plugin.process.fitting import SPREADS

QUICK = {"num_images": 8, "teacher_steps": 20}
KEYS = {"timesteps", "noise", "weights", "solver_order", "prediction_type", "guidance_scale"}
KEYS |= {"error", "default_error", "evaluations", "seconds"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.Parts(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def warnings_fail():
    """A solver that was fitted for a call is used in it without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the solver for")
        yield


def stable_diffusion(parts, scheduler=None):
    pipe, call = tiny.text_to_image(parts, scheduler or DDIMScheduler(**SD))
    del call["output_type"]
    return pipe, call | {"guidance_scale": 7.5}


def noises(seeds):
    return [torch.Generator().manual_seed(i) for i in seeds]


def weights(found):
    return torch.tensor([weight for row in found["weights"] for weight in row])


# ---- stock loops ----------------------------------------------------------------------------------------------------

PICTURES = ("Stable Diffusion, text to image", "Stable Diffusion XL", "DDPMPipeline", "DDIMPipeline", "DiT")


@pytest.mark.parametrize("family", PICTURES)
def test_in_stock_pipelines(parts, family):
    """The fitted solver is nearer on images that did not enter, and the pipeline uses it afterwards."""
    pipe, call = FAMILIES[family](parts, DDIMScheduler(**SD))
    call = {key: value for key, value in call.items() if key not in ("output_type", "batch_size", "generator")}
    call |= {"class_labels": [i % 4 for i in range(8)]} if family == "DiT" else {}
    pipe.set_progress_bar_config(disable=True)
    with tiny.denoiser(pipe):
        found = fit_solver(pipe, [3], **QUICK, **call)[3]
        assert found.keys() == KEYS
        assert found["error"] < found["default_error"]
        pipe(num_inference_steps=3, **call)
    assert type(pipe.scheduler) is MultistepDDIMScheduler
    assert pipe.scheduler.timesteps.tolist() == found["timesteps"]
    assert pipe.scheduler.config.fitted_solvers["3"] == found
    assert [*weighed(pipe.scheduler).values()] == found["weights"]


@pytest.mark.parametrize("family", ["Stable Diffusion 3", "Flux", "Wan"])
def test_in_flow_pipelines(family):
    pipe, call = flows.FLOW_FAMILIES[family](flows.STOCK[family](), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with flows.flow_denoiser(pipe):
        found = fit_solver(pipe, [4], **QUICK, **call)[4]
        assert found["error"] < found["default_error"]
        pipe(num_inference_steps=4, output_type="latent", **call)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(found["timesteps"])


def test_a_state_in_half_precision(parts):
    """A stock pipeline rounds it after each step."""
    pipe = tiny.ddim(parts, DDIMScheduler(**SD), copy.deepcopy(parts.unconditional).half())[0]
    with tiny.denoiser(pipe):
        found = fit_solver(pipe, [3], **QUICK)[3]
        assert found["error"] < 0.7 * found["default_error"]
        images = pipe(2, noises((1, 2)), num_inference_steps=3, output_type="np").images
    assert images.std() > 0.1


def test_without_labels_and_with(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(num_class_embeds=4), GeneralizedDDIMScheduler(eta=1.0, clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    labels = [0, 1, 2, 1, 0, 2, 2, 1]
    found = fit_solver(pipe, [2], **QUICK, class_labels=labels, guidance_scale=2.0)[2]
    assert (found["guidance_scale"], found["prediction_type"], found["solver_order"]) == (2.0, "epsilon", 3)
    assert pipe.scheduler.config.eta == 0
    pipe(2, 2, class_labels=[0, 1], guidance_scale=2.0)
    assert pipe.scheduler.timesteps.tolist() == found["timesteps"]
    pipe = diffusers.DDPMPipeline(make_unet(), DDPMScheduler())
    found = fit_solver(pipe, [2], **QUICK)[2]
    ours = GeneralizedDDIMPipeline(pipe.unet, pipe.scheduler)  # whose scale is 1, which is no guidance
    ours(1, 2)
    assert ours.scheduler.timesteps.tolist() == found["timesteps"]


def test_prompts_as_lists_and_tensors(parts):
    pipe, call = stable_diffusion(parts)
    prompts = {"prompt": [*"abcdefgh"], "negative_prompt": [*"ijklmnop"]}
    first = fit_solver(pipe, [2], **QUICK, **call | prompts)[2]
    coded = {f"{key}_embeds": pipe.encode_prompt(each, "cpu", 1, False)[0] for key, each in prompts.items()}
    other, call = stable_diffusion(parts)
    del call["prompt"]
    again = fit_solver(other, [2], **QUICK, **call, **coded)[2]
    assert torch.allclose(weights(first), weights(again), atol=1e-5)
    one = {key: each[:1] for key, each in coded.items()}
    assert not torch.allclose(weights(fit_solver(other, [2], **QUICK, **call, **one)[2]), weights(first), atol=1e-5)


def test_batches_give_nearly_the_same_solver(parts):
    found = []
    for size in (None, 4):
        pipe, _ = tiny.ddim(parts, DDIMScheduler(**SD))
        with tiny.denoiser(pipe):
            found.append(fit_solver(pipe, [3], **QUICK | {"num_images": 16}, batch_size=size)[3])
    one, other = found
    assert one["evaluations"] == other["evaluations"] == 3 * (4 + 4 + len(SPREADS) * 12 + 12)
    assert other["default_error"] == pytest.approx(one["default_error"], rel=1e-3)
    assert other["error"] == pytest.approx(one["error"], rel=0.3)


def test_a_learned_variance_is_kept(make_unet):
    scheduler = GeneralizedDDIMScheduler(variance_type="learned_range", timestep_spacing="quadratic")
    pipe = diffusers.DDPMPipeline(make_unet(out_channels=2), scheduler)
    found = fit_solver(pipe, [3], **QUICK)[3]
    assert found["error"] <= found["default_error"]
    assert pipe.scheduler.config.variance_type == "learned_range"
    images = [pipe(2, noises((0, 1)), 3, output_type="np").images for _ in range(2)]
    assert (images[0] == images[1]).all()  # without noise


# ---- what stays -----------------------------------------------------------------------------------------------------


def test_what_was_fitted_before_stays(make_pipe):
    pipe = make_pipe(
        MultistepDDIMScheduler(fitted_solvers={"9": {"timesteps": [*range(900, 0, -100)]}}, solver_order=2)
    )
    fit_solver(pipe, [3, 2], **QUICK)
    before = pipe.scheduler.config.fitted_solvers
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    fit_solver(pipe, [3, 5], **QUICK | {"seed": 100})
    config = pipe.scheduler.config
    assert config.fitted_solvers.keys() == {"2", "3", "5", "9"}
    assert config.fitted_solvers["2"] == before["2"]
    assert config.fitted_solvers["3"] != before["3"]
    assert (config.solver_order, config.fitted_solvers.pop("9")) == (2, {"timesteps": [*range(900, 0, -100)]})
    assert all(each["solver_order"] == 2 for each in config.fitted_solvers.values())


def test_a_fit_depends_on_its_seed(make_pipe):
    def found(seed):
        return weights(fit_solver(make_pipe(), [2], **QUICK, seed=seed)[2])

    assert torch.equal(found(0), found(0))
    assert not torch.equal(found(0), found(50))


def test_an_interrupted_fit_leaves_the_pipeline_as_it_was(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(), before := GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(desc="mine")
    state, calls = dict(vars(pipe)), []

    def interrupt(*args):
        calls.append(args)
        if len(calls) > 45:  # in the search
            raise KeyboardInterrupt

    pipe.unet.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit_solver(pipe, [3], **QUICK)
    assert pipe.scheduler is before
    assert vars(pipe) == state
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_time_for_refinement_ends(make_pipe):
    """Even if it is over before it begins; at one step too."""
    plain, timed, late = (fit_solver(make_pipe(), [1, 2], **QUICK, minutes=each) for each in (0.0, 0.01, 1e-9))
    for S in (1, 2):
        assert late[S]["weights"] == plain[S]["weights"]
        assert timed[S]["evaluations"] > late[S]["evaluations"] > plain[S]["evaluations"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": []}, r"steps must be integers from 1 to half of teacher_steps=20, not \[\]"),
        ({"steps": [5, 0]}, r"not \[5, 0\]"),
        ({"steps": [2.5]}, r"not \[2\.5\]"),
        ({"steps": [11]}, r"half of teacher_steps=20, not \[11\]"),
        ({"teacher_steps": 1}, "teacher_steps must be an integer of at least 2, not 1"),
        ({"teacher_steps": 1001}, "from 1 to 1000"),
        ({"num_images": 3}, "num_images must be an integer of at least 4, not 3"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"minutes": -1.0}, "minutes must be a finite number of 0 or more, not -1.0"),
        ({"minutes": float("nan")}, "minutes must be a finite number of 0 or more, not nan"),
        ({"guidance": 2.0}, "guidance cannot be passed on to GeneralizedDDIMPipeline: leave it out"),
        ({"eta": 1.0, "latents": None}, "eta, latents cannot be passed on"),
        ({"guidance_scale": 2.0}, "this network is unconditional"),
    ],
)
def test_bad_arguments_are_refused_before_any_evaluation(make_pipe, settings, message):
    pipe = make_pipe(before := GeneralizedDDIMScheduler())
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        fit_solver(pipe, **{"steps": [2]} | QUICK | settings)
    assert pipe.scheduler is before


@pytest.mark.parametrize("settings", [{"solver_order": 1}, {"denoising_start": 0.5}, {"denoising_end": 0.5}])
def test_settings_that_cannot_be_fitted(make_pipe, settings):
    pipe = make_pipe(MultistepDDIMScheduler(**settings))
    pipe.unet.forward = None
    with pytest.raises(ValueError, match="a fit needs the whole process, and solver_order 2, 3 or 4, or None, not 1"):
        fit_solver(pipe, [2], **QUICK)


def test_images_that_are_not_finite(make_pipe):
    pipe = make_pipe(before := GeneralizedDDIMScheduler())
    pipe._predict = lambda x, t, condition: torch.full_like(x, torch.nan)
    with pytest.raises(ValueError, match="classifier is not finite"):
        fit_solver(pipe, [3], **QUICK)
    assert pipe.scheduler is before


class Unseeded(GeneralizedDDIMPipeline):
    def __call__(self, batch_size=None, num_inference_steps=None, generator=None, output_type="pil", return_dict=True):
        return super().__call__(batch_size, num_inference_steps, output_type=output_type)


class Unsteady(GeneralizedDDIMPipeline):
    def __call__(self, num_inference_steps=None):
        return super().__call__(1, num_inference_steps)


def test_noise_that_does_not_follow_the_generators(make_unet):
    for cls, message in ((Unseeded, "Unseeded does not draw x_T from its generators"), (Unsteady, "no generator")):
        pipe = cls(make_unet(), before := GeneralizedDDIMScheduler())
        with pytest.raises(ValueError, match=message):
            fit_solver(pipe, [3], **QUICK)
        assert pipe.scheduler is before


def test_loops_without_all_steps_of_all_images(parts):
    """Image to image, a loop that is interrupted, and one with timesteps of its own."""
    pipe, call = tiny.image_to_image(parts, DDIMScheduler(**SD))
    del call["output_type"]
    for strength in (0.7, 1.0):
        with pytest.raises(ValueError, match="does not make all steps from x_T for 6 images"):
            fit_solver(pipe, [3], **QUICK, **call | {"strength": strength, "prompt": ["a"] * 8})
    pipe, call = stable_diffusion(parts)
    with pytest.raises(ValueError, match="does not make all steps"):
        fit_solver(pipe, [3], **QUICK, **call, callback_on_step_end=stop)
    pipe, call = flows.FLOW_FAMILIES["Qwen-Image"](flows.STOCK["Qwen-Image"](), torch.float32)
    with pytest.raises(ValueError, match="sets its own timesteps, or does not"):
        fit_solver(pipe, [3], **QUICK, **call)


def stop(pipe, i, t, tensors):
    pipe._interrupt = True
    return {}


def test_one_image_that_went_elsewhere_does_not_decide():
    solved, rng = SimpleNamespace(data=torch.zeros(16, 10)), torch.Generator().manual_seed(0)
    plain = SimpleNamespace(data=0.02 * torch.randn(16, 10, generator=rng))
    nearer = SimpleNamespace(data=plain.data / 2)
    nearer.data[3] = 1.0
    assert nearer.data.square().mean() > plain.data.square().mean()
    assert _distance(nearer, solved) < 0.7 * _distance(plain, solved)
