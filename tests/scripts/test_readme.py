"""The READMEs: their Python runs as it stands, with tiny networks as the checkpoints it names, and they stay short."""

import importlib
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny_stable_diffusion
import torch
from loopback_hub import LoopbackHub
from tiny_flow_pipelines import FLOW_FAMILIES, STOCK
from trainer import settings

import ddim_plugin
from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.cli.parser import parse

ROOT = Path(__file__).parents[2]
README, REFERENCE = ROOT / "README.md", ROOT / "ddim_plugin" / "README.md"
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (README, REFERENCE, ROOT / "training" / "README.md", ROOT / "model_cards" / "README.md")
}
LINKS = [(name, path) for name, text in DOCUMENTS.items() for path in re.findall(r"\]\((?!http)([^)]+)\)", text)]
COMMANDS = [
    line
    for text in DOCUMENTS.values()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "…" not in line and re.search(r"training/\w+\.py|^ddim-plugin", line)
]
MARKED = re.compile(r"<!-- (\S+/\S+) -->\n\n(.*?)\n*<!-- end -->", re.DOTALL)


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def add_repo(hub, name, pipe, folder):
    pipe.save_pretrained(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    hub.add_repo(name, {file.relative_to(folder).as_posix(): file.read_bytes() for file in files})


def test_the_examples_run(monkeypatch, make_unet, tmp_path):
    text, load, process, few, fit, latents, edit, convert, flow, save, restore = blocks(README)
    monkeypatch.chdir(tmp_path)
    stock = diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large")
    unet = make_unet(channels=3)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    pndm = diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True)
    sd = tiny_stable_diffusion.build(tmp_path / "tokenizer", pndm)
    names = {}
    with LoopbackHub() as hub, hub.in_process(tmp_path / "home", "hf_user"):
        hub.add_user("user", "hf_user")
        add_repo(hub, "google/ddpm-cifar10-32", diffusers.DDPMPipeline(unet, stock), tmp_path / "ddpm")
        add_repo(hub, "stable-diffusion-v1-5/stable-diffusion-v1-5", sd, tmp_path / "sd")
        exec(text, names)
        assert isinstance(names["sd"].scheduler, MultistepDDIMScheduler)
        assert names["image"].size == (16, 16)
        exec(load, names)
        assert [image.size for image in names["images"]] == [(8, 8)] * 16
        assert isinstance(names["pipe"].scheduler, GeneralizedDDIMScheduler)
        exec(process, names)
        assert len(names["images"]) == 4
        assert names["pipe"].scheduler.timesteps.tolist() == [981, 841, 701, 561, 421, 281, 141, 1]
        assert names["pipe"].scheduler.config.variance_type == "fixed_small"
        assert names["pipe"].scheduler.config.timestep_spacing == "quadratic"
        exec(few, names)
        assert isinstance(names["fast"].scheduler, MultistepDDIMScheduler)
        exec(fit.replace("[5, 8, 10]", "[5]"), names)
        assert names["found"][5]["error"] < names["found"][5]["default_error"]
        exec(latents, names)
        assert [len(names[name]) for name in ("again", "path", "grid", "variants")] == [4, 11, 25, 4]
        names["picture"] = names["image"]
        exec(edit.replace("num_inference_steps=20", "num_inference_steps=4"), names)
        assert names["edited"].size == (16, 16)
        exec(convert, names)
        assert type(names["stock"]) is diffusers.DDIMScheduler
        assert names["same"].config == names["pipe"].scheduler.config
        names["flux"], _ = FLOW_FAMILIES["Flux"](STOCK["Flux"](), torch.float32)
        exec(flow, names)
        assert names["flux"].scheduler.config.eta == 0.7
        assert names["flux"].scheduler.config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
        exec(save, names)
        assert hub.repos["user/my-model"].private
        assert "README.md" in hub.files("user/my-model")
        for source in ("my-model", "user/my-model"):
            again = GeneralizedDDIMPipeline.from_pretrained(source)
            assert again.scheduler.config.timestep_spacing == "quadratic"
            assert torch.equal(again.unet.conv_out.weight, unet.conv_out.weight)
            assert type(diffusers.DiffusionPipeline.from_pretrained(source)) is diffusers.DDIMPipeline
        [name] = {name for each in DOCUMENTS.values() for name in re.findall(r'custom_pipeline="(\w+)"', each)}
        assert name == "ddim_plugin_" + ddim_plugin.__version__.replace(".", "_")
        assert f"{name}.py" in hub.files("user/my-model")
        exec(restore, names)
        assert type(names["again"]) is diffusers.StableDiffusionPipeline
        assert type(names["again"].scheduler) is MultistepDDIMScheduler
        # Stable Diffusion sets steps_offset=1 in every scheduler, which few_steps does not use.
        same = {"steps_offset": 1, "_diffusers_version": diffusers.__version__}
        assert dict(names["again"].scheduler.config) | same == dict(names["sd"].scheduler.config) | same


def test_the_examples_of_the_reference_run(make_unet, tmp_path):
    fit, categories, density, latents, _, _, convert = blocks(REFERENCE)
    unet = make_unet(channels=3)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    pipe = GeneralizedDDIMPipeline(unet, GeneralizedDDIMScheduler(timestep_spacing="quadratic"))
    names = {"pipe": pipe, "images": pipe(2, 3).images}
    old, new, noise = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1), torch.randn(4, 3, 8, 8)
    new.load_state_dict(old.state_dict())
    flow = SimpleNamespace(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    policies = {"old": lambda x, t: old(x), "new": lambda x, t: new(x), "noise": noise, "advantage": torch.randn(4)}
    exec(density, policies | {"pipe": flow, "torch": torch, "GeneralizedDDIMScheduler": GeneralizedDDIMScheduler})
    assert new.weight.grad.norm() > 0
    classes = {"torch": torch, "network": lambda x, t: torch.ones(4, 8, 1, 28, 28)}
    exec(categories, classes)
    assert classes["x"].shape == (4, 1, 28, 28)
    assert classes["x"].unique().tolist() == [*range(8)]
    exec(latents, names)
    assert names["evaluations"].shape == (2,)
    exec(convert, names)
    exec(fit.replace("[5, 8, 10], num_images=64", "[3], num_images=8").replace("fitted", str(tmp_path)), names)
    assert names["found"][3]["error"] < names["found"][3]["default_error"]
    assert names["ours"].config.timestep_spacing == "quadratic"


def test_the_recipes_for_editing_run(monkeypatch, tmp_path):
    """On the committed model, in fewer steps: reconstructions near the pictures, and edits that are not."""
    _, _, _, _, pictures, latents, _ = (block.replace("steps=20", "steps=5") for block in blocks(REFERENCE))
    monkeypatch.chdir(ROOT)
    sd = diffusers.StableDiffusionPipeline.from_pretrained("model_cards/sd-mnist-32", safety_checker=None)
    drawn = sd(["a three", "a seven"], num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
    names = {"pictures": drawn}
    exec(pictures.replace("found.safetensors", str(tmp_path / "found.safetensors")), names)
    original, again, edited, near = (
        np.stack([np.asarray(image, np.float32) / 255 for image in images])
        for images in (drawn, names["again"], names["edited"], names["near"])
    )
    assert np.square(again - original).mean() < 0.01 < np.square(edited - original).mean()
    assert np.square(near - original).mean() < np.square(edited - original).mean()
    assert names["Inverted"].load(tmp_path / "found.safetensors").settings == names["found"].settings
    assert len(names["between"]) == 1
    names["x_0"] = names["found"].latents[:1]
    exec(latents, names)
    assert names["report"].evaluations.sum() >= 25
    assert (names["again"] - names["x_0"]).square().mean().sqrt() < 0.05


@pytest.mark.parametrize(("document", "path"), LINKS)
def test_linked_files_exist(document, path):
    path, _, heading = path.partition("#")
    linked = (ROOT / document).parent / path if path else ROOT / document
    assert linked.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_the_options_that_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "ddim-plugin":
        assert parse(words[1:]).command == words[1]
        return
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = importlib.import_module(Path(words[place]).stem)
    name = re.search(r"\bparse\((\w+)\)", Path(words[place]).read_text())[1]
    assert settings.parse(getattr(script, name), words[place + 1 :])


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```|<!--.*?-->|^\|.*?$", "", DOCUMENTS["README.md"], flags=re.DOTALL | re.MULTILINE)
    assert 500 < len(prose.split()) <= 1200


def test_marked_tables_are_the_files_they_name():
    marked = [found for text in DOCUMENTS.values() for found in MARKED.findall(text)]
    assert "model_cards/ddim-mnist-28/measured/headline.md" in [name for name, _ in marked]
    for name, table in marked:
        assert table == (ROOT / name).read_text().strip()


def test_quoted_figures_are_in_the_records():
    """Figures outside the tables, each found in the record that the README links to."""
    readme = " ".join(DOCUMENTS["README.md"].split())
    results = json.loads((ROOT / "model_cards/ddim-cifar10-32-small/results.json").read_text())["results"]
    five = [each for each in results if each["num_inference_steps"] == 5 and each["metric"].startswith("fd")]
    found = {each["scheduler"]: each["value"] for each in five}
    ours = f"{found['ours']:.2f}, fitted {found['ours, fitted']:.2f}"
    assert f"the Fréchet distance at five evaluations is {ours}" in readme
    assert f"reaches {found['the best of diffusers']:.2f}" in readme
    few = {
        (each["num_inference_steps"], each["scheduler"]): each["value"]
        for each in results
        if each["metric"].startswith("fd")
    }
    ratios = [few[S, "ours"] / few[S, "the best of diffusers"] for S in (8, 10, 20)]
    assert all(abs(ratio - 1) < 0.02 for ratio in ratios)
    speed = (ROOT / "training/measured/speed/speed.md").read_text()
    ratio = re.search(r"^\| 64×3×32×32 \| (\S+) \|", speed, re.MULTILINE)[1]
    assert (
        f"a step of the stock scheduler takes {ratio} times as long as ours, for 64 images of 32×32 without noise"
        in readme
    )
