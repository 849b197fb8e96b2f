"""One repo, three readers, each a process of its own with an empty cache, by the real client from a Hub over HTTP."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from torch import Generator

from ddim_plugin import GeneralizedDDIMPipeline

TESTS = Path(__file__).parents[1]
TOKEN = "hf_ada_writes"
CALL = {"num_inference_steps": 4}
LABELS = CALL | {"class_labels": [0, 2]}

MAKE = """
import sys
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, InverseDDIMScheduler
from ddim_plugin.hub import code as bundle
from ddim_plugin.hub.push import push_folder

torch.set_num_threads(1)

def unet(seed=0, **config):
    torch.manual_seed(seed)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)
    return UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, **blocks, **config)

def push(name, pipe, folder=None, **settings):
    folder = folder or f"models/{name}"
    pipe.save_pretrained(folder)
    if name == "plain":
        pipe.unet.half()
        pipe.save_pretrained(folder, variant="fp16")
    push_folder(folder, f"ada/{name}", **settings)

sampler = GeneralizedDDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
push("plain", GeneralizedDDIMPipeline(unet(), sampler))
push("plain", GeneralizedDDIMPipeline(unet(1), sampler), "models/other", revision="other")
push("private.v1", GeneralizedDDIMPipeline(unet(2), sampler), private=True)
noisy = dict(eta=0.5, timestep_spacing="quadratic", clip_sample=True, beta_schedule="sigmoid")
push("noisy", GeneralizedDDIMPipeline(unet(), GeneralizedDDIMScheduler(**noisy)))
push("inverse", GeneralizedDDIMPipeline(unet(), InverseDDIMScheduler(timestep_spacing="paper_linear")))
push("labelled", GeneralizedDDIMPipeline(unet(num_class_embeds=4), sampler))
push("solver", GeneralizedDDIMPipeline(unet(), DPMSolverMultistepScheduler(prediction_type="sample")))

bundle.HEADER += "\\n# As another version would differ.\\n"
bundle.code.cache_clear()
GeneralizedDDIMPipeline(unet(), sampler).save_pretrained("models/version")
"""


def read(hub, home, kind, cases, token=None, **environment):
    """The answers of a reader."""
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(TESTS / "reader.py"), kind],
        input=json.dumps(cases),
        env=hub.environment(home, token) | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        hub.add_user("ada", TOKEN)
        hub.add_user("eve", "hf_eve_reads", role="read")
        yield hub


@pytest.fixture(scope="module")
def place(hub, tmp_path_factory):
    """A folder with models/, all of which a process with the plugin pushed."""
    place = tmp_path_factory.mktemp("sharing")
    environment = hub.environment(place / "pusher", TOKEN) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MAKE], env=environment, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return place


@pytest.fixture(scope="module")
def sources(hub, place):
    """Cases by name."""
    plain, cache = "ada/plain", str(place / "cache")
    cases = {f"folder {name}": {"source": str(place / "models" / name)} for name in ("plain", "noisy", "solver")}
    cases |= {f"hub {name}": {"source": f"ada/{name}"} for name in ("plain", "noisy", "solver")}
    cases |= {"commit": {"source": plain, "kwargs": {"revision": hub.commits(plain)[0].sha}}}
    cases |= {"branch": {"source": plain, "kwargs": {"revision": "other"}}}
    cases |= {"cache_dir": {"source": plain, "kwargs": {"cache_dir": cache}}}
    half = {"kwargs": {"variant": "fp16", "torch_dtype": "float16"}}
    cases |= {"half folder": cases["folder plain"] | half, "half hub": cases["hub plain"] | half}
    cases = {name: case | {"call": CALL} for name, case in cases.items()}
    cases |= {"folder labelled": {"source": str(place / "models" / "labelled"), "call": LABELS}}
    cases |= {"hub labelled": {"source": "ada/labelled", "call": LABELS}}
    cases |= {"folder inverse": {"source": str(place / "models" / "inverse")}, "hub inverse": {"source": "ada/inverse"}}
    return cases


HUB = ("hub plain", "hub noisy", "hub solver", "hub labelled", "commit", "branch", "cache_dir", "half hub")
STOCK = ("folder plain", "hub plain", "commit", "branch", "cache_dir", "half folder", "half hub")
"""Of these the stock pipeline makes the same pictures: η = 0, and a spacing it knows."""


@pytest.fixture(scope="module")
def answers(hub, place, sources):
    """What the three readers say: online, then with a warm cache and no network."""
    private = {"source": "ada/private.v1", "call": CALL}
    asked = {
        "plugin": sources | {"private": private | {"kwargs": {"token": TOKEN}}},
        "diffusers": sources | {"version": {"source": str(place / "models" / "version"), "call": CALL}},
        "stock": {name: case for name, case in sources.items() if name in STOCK or "noisy" in name}
        | {"private": private | {"kwargs": {"token": TOKEN}}},
    }
    asked["diffusers"]["private"] = private  # the process has HF_TOKEN
    asked["diffusers"]["swapped"] = sources["hub noisy"] | {"scheduler": "DDIMScheduler"}
    asked["diffusers"]["again"] = sources["hub plain"] | {
        "save_to": str(place / "again"),
        "push_to": "ada/again",
        "same_class": True,
    }
    answers = {}

    def ask(key, cases, token=None, **environment):
        found = read(hub, place / key.split()[0], key.split()[0], list(cases.values()), token, **environment)
        answers[key] = dict(zip(cases, found, strict=True))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda kind: ask(kind, asked[kind], TOKEN if kind == "diffusers" else None), asked))
        later = {
            "plugin offline": {name: sources[name] for name in HUB},
            "stock offline": {name: sources[name] for name in STOCK if "hub" in name or name == "cache_dir"},
            "diffusers offline": {
                "folder": {"source": str(place / "again"), "call": CALL},
                "hub": sources["hub plain"],
            },
        }
        list(pool.map(lambda key: ask(key, later[key], HF_HUB_OFFLINE="1"), later))
    return answers


def images(answer):
    assert "error" not in answer, answer.get("trace")
    return np.array(answer["images"])


def test_the_pictures_tell_models_apart(answers):
    """Else their equality below would say nothing."""
    found = answers["plugin"]
    shas = {
        found[name]["sha"] for name in ("hub plain", "branch", "half hub", "hub noisy", "hub solver", "hub labelled")
    }
    assert len(shas) == 6
    inside = [(images(found[name]) > 0) & (images(found[name]) < 1) for name in ("hub plain", "branch", "hub labelled")]
    assert min(part.mean() for part in inside) > 0.5


def test_with_the_plugin(answers, sources):
    for name in sources:
        answer = answers["plugin"][name]
        assert answer.get("module") == "ddim_plugin", answer
        assert answer["said"] == []
        assert answer["dtype"] == ("torch.float16" if "half" in name else "torch.float32")
    assert answers["plugin"]["hub noisy"]["eta"] == 0.5
    assert answers["plugin"]["hub inverse"]["scheduler"] == "InverseDDIMScheduler"
    assert answers["plugin"]["hub solver"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert images(answers["plugin"]["private"]).shape == (2, 8, 8, 1)


def test_without_it_the_same_class_and_the_same_pictures(answers, sources):
    for name, case in sources.items():
        with_it, without = answers["plugin"][name], answers["diffusers"][name]
        assert "error" not in without, without.get("trace")
        assert without["said"] == []
        for key in ("pipeline", "scheduler", "eta", "dtype"):
            assert without[key] == with_it[key]
        assert without["module"].startswith("ddim_plugin_")
        if "call" in case:
            assert without["sha"] == with_it["sha"]


def test_with_stock_classes(answers):
    for name in (*STOCK, "private"):
        answer = answers["stock"][name]
        assert answer.get("pipeline") == "DDIMPipeline", answer
        assert answer["said"] == []
        if "half" in name:  # stock draws x_T and keeps the state in half precision
            assert answer["dtype"] == "torch.float16"
        else:
            assert np.abs(images(answer) - images(answers["plugin"][name])).max() < 1e-6
    assert answers["stock"]["hub noisy"]["said"] == []


def test_folder_and_hub_agree(answers):
    for found in (answers["plugin"], answers["diffusers"]):
        for name in ("plain", "noisy", "solver", "labelled"):
            assert found[f"folder {name}"]["sha"] == found[f"hub {name}"]["sha"]
        assert found["commit"]["sha"] == found["cache_dir"]["sha"] == found["hub plain"]["sha"]
        assert found["half folder"]["sha"] == found["half hub"]["sha"]


def test_offline_with_a_warm_cache(answers):
    for kind in ("plugin", "stock"):
        for name, answer in answers[f"{kind} offline"].items():
            assert answer.get("sha") == answers[kind][name]["sha"], answer
    assert answers["diffusers offline"]["folder"]["sha"] == answers["diffusers"]["hub plain"]["sha"]


def test_what_diffusers_does_not_allow(answers):
    """It asks the Hub for the commit of a repo's code, and asks for the code without the token it was given.

    The README says what to do instead: load the folder of the snapshot; log in, or set HF_TOKEN.
    """
    assert answers["diffusers"]["private"]["sha"] == answers["plugin"]["private"]["sha"]
    offline = answers["diffusers offline"]["hub"]  # older versions did not ask
    assert offline.get("error") == "OfflineModeIsEnabled" or offline["sha"] == answers["diffusers"]["hub plain"]["sha"]


def test_a_scheduler_may_be_given_instead(answers):
    assert answers["diffusers"]["swapped"].get("scheduler") == "DDIMScheduler", answers["diffusers"]["swapped"]


def test_versions_live_side_by_side(answers):
    modules = {answers["diffusers"][name]["module"] for name in ("hub plain", "version")}
    assert len(modules) == 2
    assert answers["diffusers"]["version"]["sha"] == answers["diffusers"]["hub plain"]["sha"]


def test_loading_again_keeps_the_classes(answers):
    """diffusers runs the entry files anew at each load: pipelines that are there must not notice."""
    assert answers["diffusers"]["again"]["same"] is True
    assert answers["diffusers"]["again"]["encoded"] == [1, 1, 8, 8]


def test_saved_and_pushed_again(hub, place, answers, tmp_path):
    with hub.in_process(tmp_path):
        pipe = GeneralizedDDIMPipeline.from_pretrained("ada/again")
    pipe.set_progress_bar_config(disable=True)
    seeds = [Generator().manual_seed(i) for i in range(2)]
    made = pipe(2, generator=seeds, output_type="np", **CALL).images
    assert np.abs(made - images(answers["plugin"]["hub plain"])).max() < 1e-6
    assert answers["diffusers offline"]["folder"]["module"] == answers["diffusers"]["hub plain"]["module"]
    before, after = hub.files("ada/plain"), hub.files("ada/again")
    changed = {name for name in after if before[name] != after[name]}
    assert changed <= {
        "README.md",
        "unet/diffusion_pytorch_model.safetensors",
    }  # the id in the card; the file's metadata
    assert before.keys() - after.keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}


def test_no_code_of_a_repo_is_run(hub, place, tmp_path):
    """Not even where it takes the names that diffusers looks for."""
    ran = tmp_path / "ran"
    trap = f"open({str(ran)!r}, 'w').close()\nraise SystemExit(3)\n".encode()
    files = {name: trap if name.endswith(".py") else content for name, content in hub.files("ada/plain").items()}
    for name in (
        "pipeline.py",
        "scheduler/ddim_plugin.py",
        "scheduler/diffusers.py",
        "unet/diffusers.py",
        "__init__.py",
    ):
        files[name] = trap
    hub.add_repo("ada/trap", files)
    [answer] = read(
        hub, tmp_path / "home", "plugin", [{"source": "ada/trap", "kwargs": {"trust_remote_code": True}, "call": CALL}]
    )
    assert images(answer).shape == (2, 8, 8, 1)
    assert not ran.exists()
    [answer] = read(hub, tmp_path / "other", "diffusers", [{"source": "ada/plain", "call": CALL}])
    assert "error" not in answer
    untrusted = f"from diffusers import DiffusionPipeline as P; P.from_pretrained({str(place / 'models' / 'plain')!r})"
    done = subprocess.run(
        [sys.executable, "-c", untrusted], capture_output=True, text=True, env=hub.environment(tmp_path)
    )
    assert "trust_remote_code=True" in done.stderr


def test_what_is_not_there_is_said(hub, place, tmp_path):
    cases = {
        "there is no ada/nothing on .* for all to read": {"source": "ada/nothing"},
        "there is no ada/private.v1 on .* for all to read: .* log in with a token": {"source": "ada/private.v1"},
        "no revision 'gone'": {"source": "ada/plain", "kwargs": {"revision": "gone"}},
        "needs another token": {"source": "ada/noisy", "kwargs": {"token": "hf_wrong"}},
        "variant=ema": {"source": "ada/plain", "kwargs": {"variant": "ema"}},
        "there is no folder": {"source": "./nowhere"},
        "is no id of a repo": {"source": "ada/two words"},
        "not whole in the cache": {"source": "ada/solver", "kwargs": {"local_files_only": True}},
    }
    found = read(hub, tmp_path / "home", "plugin", list(cases.values()))
    for said, answer in zip(cases, found, strict=True):
        assert answer.get("error") in ("OSError", "ValueError"), answer
        assert re.search(said, answer["message"]), answer["message"]
        assert "hf_wrong" not in json.dumps(answer)
