"""A pipeline of a tiny network, for all tests of pipelines."""

import pytest

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler


@pytest.fixture
def make_pipe(make_unet):
    def build(scheduler=None, unet=None, **config):
        pipe = GeneralizedDDIMPipeline(unet or make_unet(**config), scheduler or GeneralizedDDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build
