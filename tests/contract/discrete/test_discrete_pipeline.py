"""The pipeline with the scheduler for categorical data."""

import json

import pytest
import torch

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline
from ddim_plugin.hub.push import push_folder

K = 4


@pytest.fixture
def pipe(make_unet):
    unet = make_unet(channels=1, out_channels=K, num_class_embeds=3)
    made = GeneralizedDDIMPipeline(unet, DiscreteDDIMScheduler(num_classes=K, eta=0.5))
    made.set_progress_bar_config(disable=True)
    return made


def seeds(*numbers):
    return [torch.Generator().manual_seed(each) for each in numbers]


def sample(pipe, *numbers, **settings):
    settings = {"class_labels": 1, "output_type": "latent"} | settings
    return pipe(len(numbers), 3, generator=seeds(*numbers), **settings).images


def test_images_are_the_brightness_of_tokens(pipe):
    tokens = sample(pipe, 0, 1)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.unique(), torch.arange(K))
    torch.testing.assert_close(sample(pipe, 0, 1, output_type="pt"), tokens / (K - 1))
    assert sample(pipe, 0, 1, output_type="pil")[0].size == (8, 8)


def test_an_image_depends_on_its_generator_alone(pipe):
    batch = sample(pipe, 0, 1, 2)
    for i in range(3):
        assert torch.equal(sample(pipe, i)[0], batch[i])


def test_the_loop_is_that_of_the_scheduler(pipe):
    z = torch.randn(2, 1, 8, 8)
    found = sample(pipe, 0, 1, latents=z, eta=1.0, guidance_scale=2.0)
    scheduler, generators = DiscreteDDIMScheduler(K), seeds(0, 1)
    scheduler.set_timesteps(3)
    x = scheduler.initial_sample(z)
    for t in scheduler.timesteps:
        level = 2 * x / (K - 1) - 1
        with torch.no_grad():
            given, null = (pipe.unet(level, t, class_labels=torch.full((2,), c)).sample for c in (1, 2))
        x = scheduler.step(null + 2 * (given - null), t, x, eta=1.0, generator=generators).prev_sample
    assert (found != x).float().mean() < 0.02  # sums of another order


def test_a_saved_folder_loads_and_names_this_package(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "GeneralizedDDIMPipeline"
    assert index["scheduler"] == ["ddim_plugin.schedulers.discrete", "DiscreteDDIMScheduler"]
    loaded = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DiscreteDDIMScheduler
    assert loaded.scheduler.config.eta == 0.5
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, 3), sample(pipe, 3))


def test_two_tokens_are_not_taken_for_a_learned_variance(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(out_channels=2), DiscreteDDIMScheduler(2))
    assert torch.equal(sample(pipe, 0, class_labels=None).unique(), torch.arange(2))


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_a_network_of_another_number_of_tokens_is_refused(make_unet, outputs):
    pipe = GeneralizedDDIMPipeline(make_unet(out_channels=outputs), DiscreteDDIMScheduler(K))
    with pytest.raises(ValueError, match=f"predicts {outputs} channels from 1: num_classes=4 needs 4"):
        pipe(1, 2)


def test_a_repository_is_refused(pipe, tmp_path):
    """Its code file could not open the folder without this package."""
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a model of categories"):
        push_folder(tmp_path, "user/model")


def test_what_needs_a_gaussian_process_is_refused(pipe):
    with pytest.raises(ValueError, match="latents need a Gaussian process, and this one is for categories"):
        pipe.encode(torch.rand(1, 1, 8, 8), 3, class_labels=1)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], not 2"):
        sample(pipe, 0, eta=2)
