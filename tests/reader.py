"""A reader of shared models, as a process: python reader.py plugin|code|diffusers|ddim|scheduler < cases.json

Each case is {"source", "kwargs", "call"} and maybe "save_to", "push_to" or "same_class". The answers, as JSON on the
last line, are what was loaded and the images it made, or the error. A reader loads by
    plugin: GeneralizedDDIMPipeline, with the package;
    code: DiffusionPipeline with the code file of the repository;
    diffusers: DiffusionPipeline, without a flag;
    ddim: DDIMPipeline;
    scheduler: the scheduler alone, by DDIMScheduler, and the network alone, by UNet2DModel.
All but the first cannot import the package. A case may name another of these as its "kind", with "plugin" last, a class
of diffusers as its "pipeline", and a "login", which stays; "trust" is false where a code file is not trusted.
"""

import hashlib
import json
import logging
import os
import sys
import traceback

KEPT = {}
"""The pipelines of this process by their kind, in their order."""


class Missing:
    """Stands in the way of an installed plugin."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ddim_plugin":
            raise ModuleNotFoundError(f"No module named {name!r}")


class Records(logging.Handler):
    """Collects what diffusers says at the level of warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def code_file(source, kwargs):
    """The name of the newest code file in a folder or repository."""
    from pathlib import Path

    from huggingface_hub import HfApi

    if Path(source).is_dir():
        names = [path.name for path in Path(source).glob("*.py")]
    else:
        names = HfApi().list_repo_files(source, revision=kwargs.get("revision"))
    return max(name for name in names if name.startswith("ddim_plugin_") and name.endswith(".py"))[:-3]


def open_pipeline(kind, source, kwargs, case):
    import diffusers

    if kind == "plugin":
        from ddim_plugin import GeneralizedDDIMPipeline

        return GeneralizedDDIMPipeline.from_pretrained(source, **kwargs)
    if kind == "code":
        name = case.get("code") or code_file(source, kwargs)
        return diffusers.DiffusionPipeline.from_pretrained(
            source, custom_pipeline=name, trust_remote_code=case.get("trust", True), **kwargs
        )
    if kind in ("diffusers", "ddim"):
        name = case.get("pipeline", "DiffusionPipeline" if kind == "diffusers" else "DDIMPipeline")
        return getattr(diffusers, name).from_pretrained(source, **kwargs)
    hub = {key: value for key, value in kwargs.items() if key not in ("variant", "torch_dtype")}
    return diffusers.DDIMPipeline(
        diffusers.UNet2DModel.from_pretrained(source, subfolder="unet", **kwargs),
        diffusers.DDIMScheduler.from_pretrained(source, subfolder="scheduler", **hub),
    )


def read(kind, case, records):
    import torch

    records.said.clear()
    kind = case.get("kind", kind)
    if kind == "plugin":
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Missing)]
    if "login" in case:
        os.environ["HF_TOKEN"] = case["login"]
    kwargs = dict(case.get("kwargs", {}))
    if "torch_dtype" in kwargs:
        kwargs["torch_dtype"] = getattr(torch, kwargs["torch_dtype"])
    if "scheduler" in case:
        import diffusers

        kwargs["scheduler"] = getattr(diffusers, case["scheduler"])()
    pipe = open_pipeline(kind, case["source"], kwargs, case)
    pipe.set_progress_bar_config(disable=True)
    answer = {
        "pipeline": type(pipe).__name__,
        "module": type(pipe).__module__,
        "scheduler": type(pipe.scheduler).__name__,
        "eta": pipe.scheduler.config.get("eta"),
        "dtype": str(pipe.unet.dtype),
        "said": list(records.said),
    }
    if "call" in case:
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        call = {"batch_size": 2, "output_type": "np"} | case["call"]
        images = pipe(generator=seeds, **call).images
        answer |= {"images": images.tolist(), "sha": hashlib.sha256(images.tobytes()).hexdigest()}
    if "save_to" in case:
        pipe.save_pretrained(case["save_to"])
    if "push_to" in case:
        answer["pushed"] = str(pipe.push_to_hub(case["push_to"]))
    if case.get("same_class"):
        first = KEPT[kind][0]
        answer["same"] = type(first) is type(pipe) and isinstance(first.scheduler, type(pipe.scheduler))
        answer["encoded"] = list(first.encode(torch.rand(1, 1, 8, 8), num_inference_steps=3).shape)
    KEPT.setdefault(kind, []).append(pipe)
    return answer


def main(kind):
    if kind != "plugin":
        sys.meta_path.insert(0, Missing())
        try:
            import ddim_plugin  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("the plugin can be imported")
    import torch

    torch.set_num_threads(1)
    records = Records()
    for name in ("diffusers", "ddim_plugin"):
        logging.getLogger(name).addHandler(records)
    answers = []
    for case in json.load(sys.stdin):
        try:
            answers.append(read(kind, case, records))
        except Exception as error:
            answers.append(
                {
                    "error": type(error).__name__,
                    "message": str(error),
                    "trace": traceback.format_exc(),
                    "said": records.said[:],
                }
            )
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
