"""One repository, five readers, in processes with empty caches, by the real client from a Hub over HTTP.

Only the reader "plugin" can import the package, in a process of its own: see `tests/reader.py`.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from loopback_hub import LoopbackHub
from torch import Generator

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, InverseDDIMScheduler
from ddim_plugin.hub.code import code
from ddim_plugin.hub.push import push_folder

TESTS = Path(__file__).parents[2]
TOKEN = "hf_ada_writes"
CALL = {"num_inference_steps": 4}
LABELS = CALL | {"class_labels": [0, 2]}
TRAP = b"import os\nos._exit(3)\n"
MISSING = {
    "ada/nothing": {"source": "ada/nothing"},
    "ada/private.v1": {"source": "ada/private.v1"},
    "revision/gone": {"source": "ada/plain", "kwargs": {"revision": "gone"}},
    "401 Client Error|401 Unauthorized": {"source": "ada/noisy.v1.0", "kwargs": {"token": "hf_wrong"}},
    "variant=ema": {"source": "ada/plain", "kwargs": {"variant": "ema"}},
    "Repo id must .*/nowhere": {"source": "./nowhere"},
    "ada/two words": {"source": "ada/two words"},
    "cache": {"source": "ada/solver", "kwargs": {"local_files_only": True}},
}
"""Sources that cannot be loaded, by what the error says."""


def unet(seed=0, channels=1, **config):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    return UNet2DModel(8, channels, channels, block_out_channels=(8, 16), norm_num_groups=4, **blocks, **config)


def push(place, name, pipe, folder=None, **settings):
    folder = place / "models" / (folder or name)
    pipe.save_pretrained(folder)
    if name == "plain":
        pipe.unet.half()
        pipe.save_pretrained(folder, variant="fp16")
    push_folder(folder, f"ada/{name}", **settings)
    (folder / f"{code().name}.py").write_text(code().text)


def make(place):
    """Save models, and push most of them."""
    sampler = GeneralizedDDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
    push(place, "plain", GeneralizedDDIMPipeline(unet(), sampler))
    push(place, "plain", GeneralizedDDIMPipeline(unet(1), sampler), "other", revision="other")
    push(place, "private.v1", GeneralizedDDIMPipeline(unet(2), sampler), private=True)
    noisy = {"eta": 0.5, "timestep_spacing": "quadratic", "clip_sample": True, "beta_schedule": "sigmoid"}
    push(place, "noisy.v1.0", GeneralizedDDIMPipeline(unet(), GeneralizedDDIMScheduler(**noisy)))
    push(place, "inverse", GeneralizedDDIMPipeline(unet(), InverseDDIMScheduler(timestep_spacing="paper_linear")))
    push(place, "labelled", GeneralizedDDIMPipeline(unet(num_class_embeds=4), sampler))
    push(place, "solver", GeneralizedDDIMPipeline(unet(), DPMSolverMultistepScheduler(prediction_type="sample")))
    flow = GeneralizedDDIMScheduler(prediction_type="flow_prediction", shift=3.0)
    push(place, "flow", GeneralizedDDIMPipeline(unet(), flow))
    exploding = GeneralizedDDIMScheduler(prediction_type="score", sigma_max=50.0)
    push(place, "exploding", GeneralizedDDIMPipeline(unet(channels=3, time_embedding_type="fourier"), exploding))
    GeneralizedDDIMPipeline(unet(), sampler).save_pretrained(place / "models" / "bare")
    GeneralizedDDIMPipeline(unet(), sampler).save_pretrained(place / "models" / "version")
    (place / "models" / "version" / "ddim_plugin_9_9_9.py").write_text(code().text)


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
    """A folder with models/, most of which were pushed."""
    place = tmp_path_factory.mktemp("sharing")
    with hub.in_process(place / "pusher", TOKEN):
        make(place)
    pushed = {name: TRAP if name.endswith(".py") else content for name, content in hub.files("ada/plain").items()}
    names = ("pipeline.py", "scheduler/ddim_plugin.py", "unet/unet.py", "__init__.py")
    hub.add_repo("ada/trap", pushed | dict.fromkeys(names, TRAP))
    hub.add_repo("ada/trap2", pushed | dict.fromkeys(("scheduler/diffusers.py", "unet/diffusers.py"), TRAP))
    return place


@pytest.fixture(scope="module")
def sources(hub, place):
    """Cases by name."""
    plain, cache = "ada/plain", str(place / "cache")
    names = ("plain", "noisy.v1.0", "solver")
    cases = {f"folder {name}": {"source": str(place / "models" / name)} for name in names}
    cases |= {f"hub {name}": {"source": f"ada/{name}"} for name in names}
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


HUB = ("hub plain", "hub noisy.v1.0", "hub solver", "hub labelled", "commit", "branch", "cache_dir", "half hub")
STOCK = ("folder plain", "hub plain", "commit", "branch", "cache_dir", "half folder", "half hub")
"""Of these the stock pipeline makes the same images: η = 0, and a spacing it knows."""


@pytest.fixture(scope="module")
def answers(hub, place, sources):
    """What the readers answer: online, then with a warm cache and no network."""
    private = {"source": "ada/private.v1", "call": CALL}
    by_token = private | {"kwargs": {"token": TOKEN}}
    stock = {name: {k: v for k, v in case.items() if k != "call" or v == CALL} for name, case in sources.items()}
    bare = {"source": str(place / "models" / "bare"), "call": CALL}
    asked = {
        "plugin": sources | {"private": by_token, "bare": bare},
        "code": sources | {"version": {"source": str(place / "models" / "version"), "call": CALL}, "private": private},
        "diffusers": stock | {"private": by_token, "bare": bare},
        "ddim": stock | {"private": by_token, "bare": bare},
        "scheduler": {name: case for name, case in sources.items() if name in STOCK or "noisy" in name}
        | {"private": by_token},
    }
    asked["diffusers"]["ddpm"] = {"source": "ada/plain", "pipeline": "DDPMPipeline"}
    asked["ddim"]["again"] = sources["hub noisy.v1.0"] | {"save_to": str(place / "stock"), "call": CALL}
    asked["code"]["swapped"] = sources["hub noisy.v1.0"] | {"scheduler": "DDIMScheduler"}
    asked["code"]["again"] = sources["hub plain"] | {"save_to": str(place / "again"), "same_class": True}
    for kind in ("plugin", "code", "diffusers"):
        asked[kind] |= {name: {"source": f"ada/{name}", "call": CALL} for name in ("flow", "exploding")}
    for kind in ("plugin", "diffusers", "ddim"):
        asked[kind] |= {name: {"source": f"ada/{name}", "call": CALL} for name in ("trap", "trap2")}
    asked["code"]["untrusted"] = sources["folder plain"] | {"trust": False}
    asked["plugin"] = MISSING | asked["plugin"]
    asked["code"]["private"]["login"] = TOKEN  # the code of a private repository is only read with HF_TOKEN
    later = {
        "plugin": {name: sources[name] for name in HUB},
        "diffusers": {name: sources[name] for name in STOCK if "hub" in name or name == "cache_dir"},
        "code": {"folder": sources["folder plain"], "hub": sources["hub plain"]},
    }
    answers = {}

    def ask(kinds, asked, suffix="", **environment):
        """Ask readers in one process, one after the other."""
        cases = [case | {"kind": kind} for kind in kinds for case in asked[kind].values()]
        found = iter(read(hub, place / kinds[0], kinds[0], cases, **environment))
        for kind in kinds:
            answers[kind + suffix] = {name: next(found) for name in asked[kind]}

    groups = ("plugin",), ("diffusers", "ddim", "scheduler", "code")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda kinds: ask(kinds, asked), groups))
    ask(("diffusers", "code", "plugin"), later, " offline", HF_HUB_OFFLINE="1")
    return answers


def images(answer):
    assert "error" not in answer, answer.get("trace")
    return np.array(answer["images"])


def test_the_images_tell_models_apart(answers):
    """Else their equality below would say nothing."""
    found = answers["plugin"]
    names = ("hub plain", "branch", "half hub", "hub noisy.v1.0", "hub solver", "hub labelled")
    assert len({found[name]["sha"] for name in names}) == 6
    inside = [(images(found[name]) > 0) & (images(found[name]) < 1) for name in ("hub plain", "branch", "hub labelled")]
    assert min(part.mean() for part in inside) > 0.5


def test_with_the_plugin(answers, sources):
    for name in sources:
        answer = answers["plugin"][name]
        assert answer.get("module") == "ddim_plugin", answer
        assert answer["said"] == []
        assert answer["dtype"] == ("torch.float16" if "half" in name else "torch.float32")
    assert answers["plugin"]["hub noisy.v1.0"]["eta"] == 0.5
    assert answers["plugin"]["hub inverse"]["scheduler"] == "InverseDDIMScheduler"
    assert answers["plugin"]["hub solver"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert images(answers["plugin"]["private"]).shape == (2, 8, 8, 1)


def test_by_the_code_file_the_same_class_and_the_same_images(answers, sources):
    for name, case in sources.items():
        with_it, without = answers["plugin"][name], answers["code"][name]
        assert "error" not in without, without.get("trace")
        assert without["said"] == []
        for key in ("pipeline", "scheduler", "eta", "dtype"):
            assert without[key] == with_it[key]
        assert without["module"].startswith("diffusers_modules.local.")
        assert without["module"].endswith(code().name)
        if "call" in case:
            assert without["sha"] == with_it["sha"]


def test_without_a_flag_the_stock_sampler(answers, sources):
    """By `DiffusionPipeline` and `DDIMPipeline`, from every folder and repository, without a warning."""
    for kind in ("diffusers", "ddim"):
        for name in (*sources, "private", "bare"):
            answer = answers[kind][name]
            if "labelled" in name:  # the pipeline passes no labels
                assert answer.get("error") is None or "class_labels" in answer["message"], answer
                continue
            assert answer.get("pipeline") == "DDIMPipeline", answer
            assert answer["module"].startswith("diffusers.")
            assert answer["scheduler"] == "DDIMScheduler"
            assert answer["said"] == []
        for name in (*STOCK, "private", "bare"):
            if "half" in name:  # stock draws x_T and keeps the state in half precision
                assert answers[kind][name]["dtype"] == "torch.float16"
            else:
                assert np.abs(images(answers[kind][name]) - images(answers["plugin"][name])).max() < 1e-6
    assert answers["diffusers"]["ddpm"].get("pipeline") == "DDPMPipeline", answers["diffusers"]["ddpm"]


def test_other_paths(answers):
    """The stock pipelines sample a flow model by Euler's steps, and an exploding one by predictor and corrector."""
    for name, pipeline, scheduler in (
        ("flow", "DDPMPipeline", "FlowMatchEulerDiscreteScheduler"),
        ("exploding", "ScoreSdeVePipeline", "ScoreSdeVeScheduler"),
    ):
        ours, code_s, stock = (answers[kind][name] for kind in ("plugin", "code", "diffusers"))
        assert ours.get("scheduler") == code_s.get("scheduler") == "GeneralizedDDIMScheduler", (ours, code_s)
        assert ours["sha"] == code_s["sha"]
        assert (stock.get("pipeline"), stock.get("scheduler")) == (pipeline, scheduler), stock
        assert ours["said"] == code_s["said"] == []
    assert np.abs(images(answers["diffusers"]["flow"]) - images(answers["plugin"]["flow"])).max() < 2e-6


def test_the_parts_alone(answers):
    for name in (*STOCK, "private"):
        answer = answers["scheduler"][name]
        assert answer.get("pipeline") == "DDIMPipeline", answer
        assert answer["said"] == []
        if "half" not in name:
            assert np.abs(images(answer) - images(answers["plugin"][name])).max() < 1e-6
    assert answers["scheduler"]["hub noisy.v1.0"]["said"] == []


def test_the_code_file_changes_nothing_for_others(answers):
    for kind in ("plugin", "diffusers", "ddim"):
        assert answers[kind]["bare"]["sha"] == answers[kind]["folder plain"]["sha"]


def test_folder_and_hub_agree(answers):
    for kind in ("plugin", "code", "diffusers"):
        found = answers[kind]
        for name in ("plain", "noisy.v1.0", "solver"):
            assert found[f"folder {name}"]["sha"] == found[f"hub {name}"]["sha"]
        assert found["commit"]["sha"] == found["cache_dir"]["sha"] == found["hub plain"]["sha"]
        assert found["half folder"]["sha"] == found["half hub"]["sha"]
    assert answers["code"]["folder labelled"]["sha"] == answers["code"]["hub labelled"]["sha"]


def test_offline_with_a_warm_cache(answers):
    for kind in ("plugin", "diffusers"):
        for name, answer in answers[f"{kind} offline"].items():
            assert answer.get("sha") == answers[kind][name]["sha"], answer
    assert answers["code offline"]["folder"]["sha"] == answers["code"]["hub plain"]["sha"]


def test_what_diffusers_does_not_allow(answers):
    """It asks the Hub for the commit of a repository's code, and asks for the code without the token it was given.

    The README names the remedies: load the folder of the snapshot; log in, or set HF_TOKEN.
    """
    assert answers["code"]["private"]["sha"] == answers["plugin"]["private"]["sha"]
    offline = answers["code offline"]["hub"]  # older versions did not ask
    assert offline.get("error") == "OfflineModeIsEnabled" or offline["sha"] == answers["code"]["hub plain"]["sha"]


def test_a_scheduler_may_be_given_instead(answers):
    assert answers["code"]["swapped"].get("scheduler") == "DDIMScheduler", answers["code"]["swapped"]


def test_versions_live_side_by_side(answers):
    modules = {answers["code"][name]["module"] for name in ("hub plain", "version")}
    assert len(modules) == 2
    assert answers["code"]["version"]["module"] == "diffusers_modules.local.ddim_plugin_9_9_9"
    assert answers["code"]["version"]["sha"] == answers["code"]["hub plain"]["sha"]


def test_loading_again_keeps_the_classes(answers):
    """diffusers runs the code file anew at each load: pipelines that exist must not notice."""
    assert answers["code"]["again"]["module"] == answers["code"]["hub plain"]["module"]
    assert answers["code"]["again"]["encoded"] == [1, 1, 8, 8]


def files(folder):
    """Contents by name; configs without the path they were loaded from, which diffusers notes in them."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    configs = {name: json.loads(content) for name, content in found.items() if name.endswith(".json")}
    return found | {name: {k: v for k, v in each.items() if k != "_name_or_path"} for name, each in configs.items()}


def test_saved_again_by_the_code_file_it_is_the_same(place, answers):
    assert "error" not in answers["code"]["again"], answers["code"]["again"]["trace"]
    before, after = files(place / "models" / "bare"), files(place / "again")
    assert after == before


def test_saved_again_by_stock_classes_ours_is_restored(place, answers):
    assert "error" not in answers["ddim"]["again"], answers["ddim"]["again"]["trace"]
    pipe = GeneralizedDDIMPipeline.from_pretrained(place / "stock")
    pipe.set_progress_bar_config(disable=True)
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.eta) == ("GeneralizedDDIMScheduler", 0.5)
    seeds = [Generator().manual_seed(i) for i in range(2)]
    made = pipe(2, generator=seeds, output_type="np", **CALL).images
    assert np.abs(made - images(answers["plugin"]["hub noisy.v1.0"])).max() < 1e-6


def test_no_code_of_a_repo_is_run(answers):
    """Not even if it has the names that diffusers looks for. The code would end the process."""
    for kind in ("plugin", "diffusers", "ddim"):
        assert images(answers[kind]["trap"]).shape == (2, 8, 8, 1)
        assert "Pass `trust_remote_code=True` to allow" in answers[kind]["trap2"]["message"]
    assert "trust_remote_code=True" in answers["code"]["untrusted"]["message"]


def test_what_is_not_there_is_said(answers):
    for said in MISSING:
        answer = answers["plugin"][said]
        assert "error" in answer, answer
        assert re.search(said, answer["message"] + answer["trace"]), answer["trace"]
        assert "hf_wrong" not in json.dumps(answer)
