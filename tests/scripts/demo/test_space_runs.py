"""A Space that was pushed runs as the Hub runs it: `python app.py` in a copy of its files."""

from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from page_models import model
from PIL import Image
from visitor import Visitor

from ddim_plugin import cli

MODEL, TOKEN = "ada/tiny", "hf_ada_writes"


@pytest.fixture(scope="module")
def space(serve, make_unet, tmp_path_factory):
    """The address of a Space's page, and the folder of its files."""
    home = tmp_path_factory.mktemp("space")
    model(make_unet, "classes").save_pretrained(home / "model")
    (home / "model" / "README.md").write_text("# A card of mine\n")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 5 * 8), np.uint8)
    Image.fromarray(pixels).save(home / "model" / "held-out.png")
    with LoopbackHub() as hub, hub.in_process(home / "writer", TOKEN):
        hub.add_user("ada", TOKEN)
        assert cli.main(["push", str(home / "model"), MODEL, "--space"]) == 0
        folder = Path(hub.client().snapshot_download(MODEL, repo_type="space", local_dir=home / "files"))
        first = folder / "ddim_plugin" / "__init__.py"
        first.write_text(first.read_text() + "\nprint('imported from', __file__)\n")
        environment = {name: value for name, value in hub.environment(home / "reader").items() if name != "PYTHONPATH"}
        url = serve("app.py", cwd=folder, env=environment)
        assert f"imported from {first}" in serve.log(url)
        yield url


def test_the_page_shows_the_model_of_the_hub(space):
    with urlopen(space) as page:
        assert MODEL in page.read().decode()


def test_the_space_samples_and_reconstructs(browser, space):
    visitor = Visitor(browser.new_context().new_page(), space)
    costs, rows = visitor.sample(Numbers="2 3", Class=1)
    assert [line.split(",")[0] for line in costs] == ["S = 2: 2 calls of the network", "S = 3: 3 calls of the network"]
    assert rows[0] != visitor.sample(Class=2)[1][0]
    visitor.open("Latents")
    assert visitor.page.get_by_role("button", name="Thumbnail").count() == 5
    visitor.button("Reconstruct A").click()
    visitor.wait(lambda: visitor.source("Reconstruct A"))
    assert visitor.errors == []
    visitor.page.context.close()
