"""The runs of the page, without a browser: every kind of model samples, or is refused by a sentence."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from page_models import KINDS, drain, model
from PIL import Image

from ddim_plugin import (
    DiscreteDDIMScheduler,
    GeneralizedDDIMPipeline,
    GeneralizedDDIMScheduler,
    MultistepDDIMScheduler,
    cli,
)

pytest.importorskip("gradio", reason='the page needs Gradio: pip install "ddim-plugin[demo]"')

from page import app

from ddim_plugin.schedulers.config import path_of

PLAIN = (app.MODEL, app.MODEL, 0.0, "fixed_small", 0, 2)  # τ, order, η, variance, seed and pictures
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 13, 3), np.uint8))  # of another size and mode


@pytest.fixture
def demo(make_unet):
    return app.Demo(model(make_unet, "paper"), [])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_samples(make_unet, monkeypatch, kind):
    monkeypatch.setattr(app, "BETWEEN", 0.0)  # a preview of each step
    pipe = model(make_unet, kind)
    demo, labels = app.Demo(pipe, []), {"class_labels": 1, "guidance_scale": 2.0} if kind == "classes" else {}
    steps = ("2 3", *PLAIN[:3], pipe.scheduler.config.variance_type, *PLAIN[4:])
    texts, pictures = zip(*demo.sample(*steps, **labels), strict=True)
    assert [text.splitlines()[-1].split(",")[0] for text in texts] == [
        "S = 2: predicted x0 at step 1",
        "S = 2: predicted x0 at step 2",
        f"S = 2: {4 if labels else 2} calls of the network",
        *(f"S = 3: predicted x0 at step {i}" for i in (1, 2, 3)),
        f"S = 3: {6 if labels else 3} calls of the network",
    ]
    assert all(picture.getextrema() != ((255, 255),) * 3 for picture in pictures)
    assert "S = 2: " in texts[-1].splitlines()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_every_kind_of_model(make_unet, kind):
    demo = app.Demo(model(make_unet, kind), [])
    labels = {"class_labels": 1, "guidance_scale": 1.0} if kind == "classes" else {}
    text, _ = list(demo.reconstruct(20, PICTURE, **labels))[-1]
    errors = {line.split(":")[0]: float(line.split()[3].rstrip(",")) for line in text.splitlines()}
    assert errors.keys() == {"plain", "exact"}
    assert errors["exact"] < 1e-3 < errors["plain"] < 1
    ((frames, place, first),) = demo.path(2, PICTURE, PICTURE.rotate(90), **labels)
    assert (len(frames), place, first) == (app.FRAMES, 0, frames[0])
    assert frames[0].tobytes() != frames[-1].tobytes()
    ((corners,),) = zip(demo.corners(2, *(PICTURE.rotate(90 * i) for i in range(4)), **labels), strict=True)
    assert min(corners.size) >= 7 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_of_every_kind_of_model(make_unet, kind, monkeypatch):
    monkeypatch.setattr(app, "SOLUTION", 20)
    demo = app.Demo(model(make_unet, kind), [])
    labels = {"class_labels": 1, "guidance_scale": 1.0} if kind == "classes" else {}
    if kind in ("exploding", "EDM"):
        assert path_of(demo.config) not in app.STOCK
        return
    lines = list(demo.few_steps(4, 0, 2, **labels))[-1][0].splitlines()
    names = ["the solution", "ddim-plugin", *(["ddim-plugin, fitted"] if kind == "fitted" else [])]
    names += ["Euler" if kind == "flow" else "DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC", "DEIS"]
    assert [line.split(": ")[0] for line in lines] == names
    assert all(0 < float(line.split()[-1]) < 1 for line in lines[1:])
    assert [" 4 steps" in line for line in lines] == [False] + [True] * (len(names) - 1)


def test_half_precision(make_unet):
    demo = app.Demo(model(make_unet, "paper").to(torch.bfloat16), [])
    assert "S = 2: 2 calls" in drain(demo.sample("2", *PLAIN))[0]
    assert "exact: RMS error" in drain(demo.reconstruct(2, PICTURE))[0]


def test_pictures_depend_on_the_seed_and_on_each_setting_alone(demo):
    def pictures(steps="4", tau=app.MODEL, order=app.MODEL, eta=0.0, variance="fixed_small", seed=0, count=2):
        return [image.tobytes() for image in images(demo.sample(steps, tau, order, eta, variance, seed, count))]

    plain = pictures()
    assert pictures() == plain
    others = [{"steps": "5"}, {"seed": 1}, {"eta": 1.0}, {"order": 3}, {"tau": "quadratic"}, {"tau": "900 500 20 3"}]
    others += [{"eta": 1.0, "variance": "fixed_large"}]
    seen = [plain] + [pictures(**each) for each in others]
    assert len({each[-1] for each in seen}) == len(seen)
    assert pictures("7", "900, 500,20 3")[-1] == pictures(tau="900 500 20 3")[-1], (
        "a list of timesteps is used as it is"
    )


def test_equal_numbers_of_steps_are_one_row(demo):
    assert [line.split(",")[0] for line in drain(demo.sample("3 2 3.0", *PLAIN))[0].splitlines()] == [
        "S = 3: 3 calls of the network",
        "S = 2: 2 calls of the network",
    ]


def test_variances_are_those_that_the_model_can_have(make_unet):
    assert app.Demo(model(make_unet, "learned"), []).variances() == ["learned_range"]
    for table, known in ((None, []), ([1.0] * 1000, ["optimal"])):
        pipe = GeneralizedDDIMPipeline(make_unet(), GeneralizedDDIMScheduler(eps_mean_square=table))
        assert app.Demo(pipe, []).variances() == ["fixed_small", "fixed_large", *known]


def images(run):
    """The pictures of a run below their texts, which have seconds in them."""
    for _, sheet in run:
        yield sheet.crop((0, 30, sheet.width, sheet.height))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({0: "5 x"}, "'5 x' is no list of numbers"),
        ({0: " "}, "no number of steps"),
        ({0: "5 2000"}, "2000"),
        ({0: "0"}, "0"),
        ({0: "2.5"}, "2.5"),
        ({1: "900 nowhere"}, "'900 nowhere' is no list of numbers"),
        ({1: "20 900"}, "descending"),
        ({3: 0.5, 4: "fixed_large"}, "eta"),
        ({4: "learned_range"}, "learned_range"),
        ({5: None}, "the seed must be a whole number"),
        ({5: -1}, "the seed must be a whole number in 0..4294967295, not -1"),
        ({5: 1.7}, "the seed must be a whole number in 0..4294967295, not 1.7"),
        ({6: 2.5}, "the number of pictures must be an integer of at least 1, not 2.5"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_call(demo, changes, said):
    calls = []
    demo.model.unet.register_forward_hook(lambda *_: calls.append(1))
    settings = ["2", *PLAIN]
    for place, value in changes.items():
        settings[place] = value
    with pytest.raises(ValueError, match=said):
        drain(demo.sample(*settings))
    assert calls == []


def test_pictures_that_do_not_fit_are_refused(demo):
    for image, said in [
        (None, "there is no picture at A"),
        (PICTURE.convert("I"), "A has mode 'I'"),
        (Image.new("RGBA", (9, 9)), "A has transparency"),
    ]:
        with pytest.raises(ValueError, match=said):
            drain(demo.reconstruct(2, image))
    with pytest.raises(ValueError, match="there is no picture at B"):
        drain(demo.path(2, PICTURE, None))
    with pytest.raises(ValueError, match="there is no picture at D"):
        drain(demo.corners(2, PICTURE, PICTURE, PICTURE, None))


def test_classes_are_checked(make_unet):
    demo = app.Demo(model(make_unet, "classes"), [])
    for label in (None, 9, 1.7):
        with pytest.raises(ValueError, match=r"class.labels"):
            drain(demo.sample("2", *PLAIN, class_labels=label, guidance_scale=1.0))


def test_models_of_categories_and_foreign_schedulers_are_refused(make_unet):
    with pytest.raises(ValueError, match="this one is for categories"):
        app.Demo(GeneralizedDDIMPipeline(make_unet(), DiscreteDDIMScheduler(num_classes=4)), [])
    with pytest.raises(ValueError, match="GeneralizedDDIMScheduler of ddim_plugin, not"):
        app.Demo(GeneralizedDDIMPipeline(make_unet(), DDPMScheduler()), [])


def test_a_model_of_diffusers_opens(make_unet, tmp_path):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    demo = app.Demo(GeneralizedDDIMPipeline.from_pretrained(tmp_path), app.held_out(str(tmp_path)))
    assert demo.pictures == []
    assert "S = 2" in drain(demo.sample("2", *PLAIN))[0]


def test_runs_at_once_have_schedulers_of_their_own(demo):
    """Two runs, step by step in turn, give what each gives alone."""
    alone = [
        [each.tobytes() for each in images(demo.sample("4", app.MODEL, 3, 0.0, "fixed_small", i, 2))] for i in (0, 5)
    ]
    turns = zip(*(images(demo.sample("4", app.MODEL, 3, 0.0, "fixed_small", i, 2)) for i in (0, 5)), strict=True)
    first, second = zip(*turns, strict=True)
    assert [[each.tobytes() for each in run] for run in (first, second)] == alone


def test_a_port_that_cannot_be_served_is_refused_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {taken.getsockname()[1]: "cannot be used (Address already in use): choose another, or leave it out"}
        for port, said in (ports | dict.fromkeys((0, -1, 70000), "--port must be an integer from 1 to 65535")).items():
            assert cli.main(["demo", "no/model", "--port", str(port)]) == 1
            assert said in capsys.readouterr().err


def test_models_of_latents_and_texts_are_refused(capsys):
    folder = Path(__file__).parents[3] / "model_cards" / "sd-mnist-32"
    for command in (["demo", str(folder)], ["push", str(folder), "a/b", "--space"]):
        assert cli.main(command) == 1
        assert "StableDiffusionPipeline has text_encoder, vae, not pixels alone" in capsys.readouterr().err


def test_held_out_pictures_are_squares_of_a_strip(tmp_path):
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 27), np.uint8))
    strip.save(tmp_path / app.HELD_OUT)
    pictures = app.held_out(str(tmp_path))
    assert [each.size for each in pictures] == [(8, 8)] * 3
    assert [each.tobytes() for each in pictures] == [strip.crop((x, 0, x + 8, 8)).tobytes() for x in (0, 8, 16)]


def test_the_default_model_has_its_pictures():
    pipe = GeneralizedDDIMPipeline.from_pretrained(app.default_model())
    pictures = app.held_out(str(app.default_model()))
    assert len(pictures) >= len(app.CORNERS)
    assert {each.size for each in pictures} == {tuple(pipe.image_size)}
    assert isinstance(pipe.scheduler, GeneralizedDDIMScheduler | MultistepDDIMScheduler)
