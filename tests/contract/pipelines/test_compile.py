"""`torch.compile` of the network: it is compiled once for all steps, and the pictures are the same."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_graph_for_all_steps(make_unet):
    pipe = GeneralizedDDIMPipeline(make_unet(), MultistepDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=2, num_inference_steps=7, generator=generator, output_type="pt").images

    eager = images()
    codes = pipe.encode(eager, 7, refinement_steps=None)
    counter = CompileCounterWithBackend("aot_eager")
    pipe.unet.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(images(), eager, rtol=0, atol=1e-6)
    assert counter.frame_count == 1
    torch.testing.assert_close(pipe.encode(eager, 7, refinement_steps=None), codes, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_guidance_and_saving(make_unet, tmp_path):
    pipe = GeneralizedDDIMPipeline(make_unet(num_class_embeds=4), GeneralizedDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    kept = pipe.unet
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)

    def images(pipe):
        settings = {"class_labels": [0, 2], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}
        return pipe(batch_size=2, generator=torch.Generator().manual_seed(0), **settings).images

    made = images(pipe)
    pipe.save_pretrained(tmp_path)
    again = GeneralizedDDIMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is type(kept)
    torch.testing.assert_close(images(again), made, rtol=0, atol=1e-6)
