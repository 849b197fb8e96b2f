"""The README's Python runs as it stands, with tiny networks in place of the checkpoints it names."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from loopback_hub import LoopbackHub

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_run(monkeypatch, make_unet, tmp_path):
    example, few, latents, saving = BLOCKS
    stock = diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large")
    diffusers.DDPMPipeline(make_unet(channels=3), stock).save_pretrained(tmp_path / "ddpm")
    files = [file for file in (tmp_path / "ddpm").rglob("*") if file.is_file()]

    class StableDiffusion:  # the real one is in parity/test_stock_pipelines.py
        scheduler = diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True)

        def __call__(self, prompt, timesteps):
            self.scheduler.set_timesteps(timesteps=timesteps)
            return diffusers.ImagePipelineOutput(images=[prompt])

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name: StableDiffusion())
    monkeypatch.chdir(tmp_path)
    names = {}
    with LoopbackHub() as hub, hub.in_process(tmp_path / "home", "hf_user"):
        hub.add_user("user", "hf_user")
        contents = {str(file.relative_to(tmp_path / "ddpm")): file.read_bytes() for file in files}
        hub.add_repo("google/ddpm-cifar10-32", contents)
        exec(example, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 16
        assert isinstance(names["sd"].scheduler, GeneralizedDDIMScheduler)
        assert names["pipe"].scheduler.config.variance_type == "fixed_small"
        small = names["pipe"].unet.conv_out.weight  # without training, large outputs make moves that no one can invert
        torch.nn.init.normal_(small, std=0.01, generator=torch.Generator().manual_seed(0))
        names["images"] = names["pipe"](batch_size=4, num_inference_steps=10).images
        exec(few, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 16
        assert isinstance(names["sd"].scheduler, MultistepDDIMScheduler)
        assert set(names["fast"].scheduler.config.fitted_timesteps or {}) <= {"5", "8"}
        exec(latents, names)
        assert [len(names[name]) for name in ("again", "path", "grid", "variants")] == [4, 11, 25, 4]
        exec(saving, names)
        assert hub.repos["user/my-model"].private
        for source in ("my-model", "user/my-model"):
            again = GeneralizedDDIMPipeline.from_pretrained(source)
            assert again.scheduler.config.timestep_spacing == "quadratic"
            assert torch.equal(again.unet.conv_out.weight, small)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_linked_files_exist(path):
    assert (Path(__file__).parents[2] / path).exists()
