"""The page of `ddim-plugin demo`: a model's samples, latents and few steps. A Space has this file as `app.py`."""

import functools
import html
import inspect
import os
import socket
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import diffusers
import gradio as gr
import numpy as np
import torch
from diffusers.utils.torch_utils import get_device
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, ImageDraw, ImageFont

from ddim_plugin import GeneralizedDDIMPipeline, GeneralizedDDIMScheduler, MultistepDDIMScheduler
from ddim_plugin.cli.parser import number
from ddim_plugin.hub.push import explained
from ddim_plugin.pipelines.images import fit, grid
from ddim_plugin.process.spacings import NAMES, integer
from ddim_plugin.schedulers import DETERMINISTIC, keep_learned
from ddim_plugin.schedulers.config import FLOW, VP, path_of

HELD_OUT = "held-out.png"  # a strip of square pictures that a model was not trained on
MODEL = "the model's"  # the choice that keeps a setting of the model
SOLUTION = 100  # steps whose pictures stand for the solution of the ODE
FRAMES = 21  # pictures of a path
BETWEEN = 0.3  # seconds from one preview to the next, so that a browser can show them
CORNERS = "ABCD"
PAPER = "https://arxiv.org/abs/2010.02502"
# Samplers of diffusers with one evaluation a step, by the path, and a grid on which they are good at few steps.
SOLVERS = {f"DPM-Solver++ {order}M": ("DPMSolverMultistepScheduler", {"solver_order": order}) for order in (2, 3)}
SOLVERS |= {"UniPC": ("UniPCMultistepScheduler", {}), "DEIS": ("DEISMultistepScheduler", {"solver_order": 3})}
STOCK = {VP: {"DDIM": (VP, {}), **SOLVERS}, FLOW: {"Euler": (FLOW, {}), **SOLVERS}}
GRID = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min", "clip_sample": False, "thresholding": False}


def default_model() -> Path:
    """Return the folder of ddim-mnist-28, beside this file in an installation, or in a clone."""
    installed = Path(__file__).with_name("ddim-mnist-28")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "model_cards" / "ddim-mnist-28"


def held_out(model: str, revision: str | None = None) -> list[Image.Image]:
    """Return the pictures of a model's strip, or none if it has no strip."""
    try:
        known = Path(model).is_dir()
        strip = Image.open(Path(model, HELD_OUT) if known else hf_hub_download(model, HELD_OUT, revision=revision))
    except (FileNotFoundError, EntryNotFoundError):
        return []
    size = strip.height
    return [strip.crop((x, 0, x + size, size)) for x in range(0, strip.width - size + 1, size)]


def shown(rows: dict[str, np.ndarray]) -> tuple[str, Image.Image]:
    """List the texts of rows of pictures, (B, H, W, C) in [0, 1], and draw the rows, each below its text."""
    font = ImageFont.load_default(18)
    drawn = {text: grid(pictures, len(pictures)) for text, pictures in rows.items()}
    width = max(max(each.width, font.getlength(text) + 12) for text, each in drawn.items())
    sheet, y = Image.new("RGB", (int(width), sum(each.height + 30 for each in drawn.values())), "white"), 0
    for text, each in drawn.items():
        ImageDraw.Draw(sheet).text((4, y + 6), text, "black", font)
        sheet.paste(each, (0, y + 30))
        y += each.height + 30
    return "\n".join(rows), sheet


def rms(images: np.ndarray, others: np.ndarray) -> float:
    return float(np.sqrt(np.mean((images - others) ** 2)))


def numbers(text: str) -> list[float]:
    """Read numbers with spaces or commas between them."""
    try:
        return [number(word) for word in str(text).replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of numbers: write them like 5 10 20") from error


def readable(place: gr.Image) -> gr.Image:
    """Answer an upload that is no picture, or a damaged one, in a sentence of the page."""
    preprocess = place.preprocess

    def opened(payload: Any) -> Any:
        try:
            return preprocess(payload)
        except Exception as error:  # Pillow raises many kinds
            problem = f"the file at {place.label} cannot be read as a picture: upload a PNG, JPEG or WebP file"
            raise gr.Error(problem, print_exception=False) from error

    place.preprocess = opened
    return place


def check_port(port: int | None) -> None:
    """Raise ValueError for a port that cannot be served."""
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Gradio does
        try:
            probe.bind(("127.0.0.1", integer("--port", port, 1, 65535)))
        except OSError as error:
            problem = f"--port {port} cannot be used ({error.strerror})"
            raise ValueError(f"{problem}: choose another, or leave it out") from error


class Demo:
    """The runs of the page. Each has a scheduler of its own, so that visitors do not mix."""

    def __init__(self, model: GeneralizedDDIMPipeline, pictures: list[Image.Image]):
        model._check_ours("the page needs")
        self.model, self.pictures, self.config = model, pictures, model.scheduler.config

    def pipe(self, kind: type, **changes: Any) -> GeneralizedDDIMPipeline:
        """Make a pipeline of the network and a new scheduler."""
        pipe = GeneralizedDDIMPipeline(self.model.unet, kind.from_config(self.config, **changes))
        pipe.progress_bar = gr.Progress().tqdm
        return pipe

    def ode(self, kind: type = GeneralizedDDIMScheduler, **changes: Any) -> GeneralizedDDIMPipeline:
        """Make a pipeline with the process of the paper at η = 0."""
        return self.pipe(kind, **keep_learned(self.config, DETERMINISTIC), **changes)

    def noise(self, seed: float | None, count: float) -> dict[str, Any]:
        """Draw x_T of some pictures: each has a generator, with the next seed, that draws all its noise."""
        if seed is None or seed % 1 or not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be a whole number in 0..{2**32 - 1}, not {seed}: write one")
        seed, count = int(seed), integer("the number of pictures", count, 1)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        latents = torch.cat([torch.randn(self.model._shape(1), generator=each) for each in generators])
        return {"latents": latents, "generator": generators, "output_type": "np"}

    def images(self, **given: Image.Image | None) -> list[Image.Image]:
        """Crop and resize the pictures at some places for the network."""
        for place, image in given.items():
            if image is None:
                raise ValueError(f"there is no picture at {place}: upload or choose one")
        return [fit(each, self.model.image_channels, self.model.image_size, place) for place, each in given.items()]

    def sample(self, steps: str, tau: str, order: Any, eta: float, variance: str, seed: int, count: int, **labels: Any):
        """Yield the pictures of every S with their cost, and x̂0 of the step that runs."""
        listed = tau not in (MODEL, *NAMES)
        counts = [] if listed else dict.fromkeys(numbers(steps))
        plans = [{"timesteps": numbers(tau)}] if listed else [{"num_inference_steps": S} for S in counts]
        if not plans:
            raise ValueError("there is no number of steps: write some, like 5 10 20")
        changes = {"eta": eta, "variance_type": variance}
        changes |= {} if listed or tau == MODEL else {"timestep_spacing": tau}
        kinds = {MODEL: type(self.model.scheduler), 1: GeneralizedDDIMScheduler}
        changes |= {} if order in kinds else {"solver_order": order, "fitted_solvers": None}
        pipe, rows = self.pipe(kinds.get(order, MultistepDDIMScheduler), **changes), {}
        for plan in plans:
            pipe.scheduler.set_timesteps(**plan)  # refuses what it cannot do, before the first run
        for plan in plans:
            drawn, seconds, last = self.noise(seed, count), 0.0, 0.0
            pipe.scheduler.set_timesteps(**plan)
            x = drawn["latents"] * pipe.scheduler.init_noise_sigma
            condition = pipe._condition(len(x), **labels)
            for i, t in enumerate(times := pipe.scheduler.timesteps, 1):
                start = time.perf_counter()
                with torch.no_grad():
                    step, condition = pipe._step(x.to(**condition.state), t, condition, generator=drawn["generator"])
                x, seconds = step.prev_sample, seconds + time.perf_counter() - start
                gr.Progress()((i, len(times)), f"S = {len(times)}")
                if time.perf_counter() - last > BETWEEN:
                    x0 = step.pred_original_sample.clamp(*pipe.scheduler.image_range)
                    yield shown(rows | {f"S = {len(times)}: predicted x0 at step {i}": pipe._images(x0, "np")})
                    last = time.perf_counter()
            calls = f"{len(times) * (1 + (condition.scale != 1))} calls of the network"
            rows[f"S = {len(times)}: {calls}, {seconds:.2f} s"] = pipe._images(x, "np")
            yield shown(rows)

    def few_steps(self, S: int, seed: int, count: int, **labels: Any):
        """Yield pictures of the samplers from one x_T, and their distances from the solution of the ODE."""
        ours, plain = functools.partial(self.ode, MultistepDDIMScheduler), {"fitted_solvers": None}
        samplers = {"the solution": ours(**plain, solver_order=4), "ddim-plugin": ours(**plain)}
        if str(S) in (self.config.get("fitted_solvers") or {}):
            samplers["ddim-plugin, fitted"] = ours()
        for name, (kind, changes) in STOCK[path_of(self.config)].items():
            known = inspect.signature(stock := getattr(diffusers, kind)).parameters
            samplers[name] = self.pipe(stock, **changes, **{key: GRID[key] for key in GRID.keys() & known})
        rows, solution = {}, None
        for name, pipe in samplers.items():
            start, steps = time.perf_counter(), SOLUTION if not rows else S
            images = pipe(num_inference_steps=steps, **self.noise(seed, count), **labels).images
            solution = images if solution is None else solution
            cost = f"{len(pipe.scheduler.timesteps)} steps, {time.perf_counter() - start:.2f} s"
            rows[f"{name}: {cost}" + (f", RMS distance {rms(images, solution):.3f}" if rows else "")] = images
            yield shown(rows)

    def reconstruct(self, S: int, image: Image.Image | None, **labels: Any):
        """Yield a picture, its latent, the latent decoded, and the error, for the plain and the exact inverse."""
        pipe, image = self.ode(), self.images(A=image)[0]
        x, rows = np.asarray(image, np.float32).reshape(1, *image.size[::-1], -1) / 255, {}
        for name, k in {"plain": None, "exact": 8}.items():
            settings = {"return_report": True, "output_type": "np", **labels}
            again, z, report = pipe.reconstruct(image, S, k, **settings)
            z = z.movedim(1, -1).cpu().numpy() / 6 + 0.5
            text = f"{name}: RMS error {rms(again, x):.1e}, {report.total_evaluations[0]} + {S} calls"
            rows[text] = np.concatenate([x, z.clip(0, 1), again, (10 * abs(again - x)).clip(0, 1)])
            yield shown(rows)

    def path(self, S: int, a: Image.Image | None, b: Image.Image | None, **labels: Any):
        """Yield the pictures on a path from A to B, the place of the slider, and the first of them."""
        pipe = self.ode()
        z = pipe.encode(self.images(A=a, B=b), S, refinement_steps=4, **labels)
        made = pipe.interpolate(z[0], z[1], FRAMES, num_inference_steps=S, output_type="np", **labels)
        frames = [grid(each[None], 1, 256) for each in made]
        yield frames, 0, frames[0]

    def corners(self, S: int, *corners: Image.Image | None, **labels: Any):
        """Yield the grid between four pictures."""
        pipe = self.ode()
        z = pipe.encode(self.images(**dict(zip(CORNERS, corners, strict=True))), S, refinement_steps=4, **labels)
        yield grid(pipe.interpolate_grid(z, 7, num_inference_steps=S, output_type="np", **labels), 7)

    def page(self, name: str) -> gr.Blocks:
        """Build the page."""
        column, button = functools.partial(gr.Column, min_width=300), functools.partial(gr.Button, variant="primary")
        drawing = functools.partial(gr.Image, show_label=False, buttons=[], format="png", interactive=False)
        with gr.Blocks(title=name, analytics_enabled=False) as page:
            gr.Markdown(f"# {name}\nSamples and latents of a diffusion model, by ddim-plugin ([the paper]({PAPER})).")
            labels: dict[str, Any] = {}
            if self.model.unet.class_embedding is not None:
                with gr.Row():
                    labels["class_labels"] = gr.Number(0, label="Class")
                    labels["guidance_scale"] = gr.Slider(1, 10, 1, label="Guidance scale: 1 is no guidance")

            def run(start: gr.Button, function: Callable, inputs: list, outputs: list) -> None:
                def told(*given: Any):
                    condition = dict(zip(labels, given[len(inputs) :], strict=True))
                    try:
                        yield from function(*given[: len(inputs)], **condition)
                    except (ValueError, OSError) as error:
                        raise gr.Error(html.escape(str(error)), print_exception=False) from error

                queued = {"show_progress_on": outputs[-1], "concurrency_id": "network", "api_name": False}  # one by one
                start.click(told, [*inputs, *labels.values()], outputs, **queued)

            with gr.Tab("Sample"), gr.Row():
                with column():
                    info = "A name, or timesteps in place of S, such as 981 841 701 561 421 281 141 1"
                    inputs = [
                        gr.Textbox("5 10 20 50", label="Numbers of steps S: a row for each"),
                        gr.Dropdown([MODEL, *NAMES], label="Timesteps τ", info=info, allow_custom_value=True),
                        gr.Dropdown([MODEL, 1, 2, 3, 4], label="Order: how many predictions a step uses"),
                        gr.Slider(0, 1, self.config.eta, label="η: 0 is DDIM, 1 is DDPM"),
                        gr.Dropdown(self.variances(), value=self.config.variance_type, label="Variance of the noise"),
                        *self.drawn(),
                    ]
                    start = button("Sample")
                with column(scale=2):
                    picture, text = drawing(), gr.Textbox(label="Cost", lines=4)
                run(start, self.sample, inputs, [text, picture])
            with gr.Tab("Latents"):
                upload = {"type": "pil", "image_mode": None, "format": "png", "height": 150, "min_width": 140}
                upload |= {"sources": ["upload"], "buttons": [], "elem_classes": "pixels"}
                with gr.Row():
                    places = zip_longest(CORNERS, self.pictures[:4])
                    pictures = [readable(gr.Image(it, label=at, **upload)) for at, it in places]
                if self.pictures:
                    place = gr.Radio([*CORNERS], value="A", label="Click on a held-out picture to put it at")
                    settings = {"show_label": False, "allow_preview": False, "format": "png", "buttons": []}
                    held = gr.Gallery(self.pictures, elem_classes="held", **settings)

                    def put(place: str, chosen: gr.SelectData) -> list:
                        return [self.pictures[chosen.index] if each == place else gr.skip() for each in CORNERS]

                    held.select(put, place, pictures, api_name=False)
                S = gr.Slider(1, 100, 10, step=1, label="Number of steps S")
                with gr.Row():
                    with column():
                        start, picture = button("Reconstruct A"), drawing()
                        text = gr.Textbox(label="A, its latent, the latent decoded, 10 times the error", lines=2)
                        run(start, self.reconstruct, [S, pictures[0]], [text, picture])
                    with column():
                        start, frames = button("Path from A to B"), gr.State([])
                        slider, picture = gr.Slider(0, FRAMES - 1, 0, step=1, label="From A to B"), drawing()
                        run(start, self.path, [S, *pictures[:2]], [frames, slider, picture])
                        moved = {"show_progress": "hidden", "api_name": False}
                        slider.input(
                            lambda i, made: made[round(i)] if made else None, [slider, frames], picture, **moved
                        )
                    with column():
                        start, picture = button("Grid between A, B, C and D"), drawing()
                        run(start, self.corners, [S, *pictures], [picture])
            with gr.Tab("Few steps", visible=path_of(self.config) in STOCK), gr.Row():
                with column():
                    info = "Every sampler calls the network once a step"
                    inputs = [gr.Slider(2, 50, 8, step=1, label="Number of steps S", info=info), *self.drawn()]
                    start = button("Compare")
                with column(scale=2):
                    picture = drawing()
                    text = gr.Textbox(label="Cost, and distance from the solution of the ODE", lines=7)
                run(start, self.few_steps, inputs, [text, picture])
        return page

    def variances(self) -> list[str]:
        """List the variances that the model can have."""
        known = ["optimal"] if self.config.eps_mean_square else []
        learned = self.config.variance_type == "learned_range"
        return ["learned_range"] if learned else ["fixed_small", "fixed_large", *known]

    def drawn(self) -> list:
        """Make the inputs of `noise`."""
        return [gr.Number(0, label="Seed"), gr.Slider(1, 16, 8, step=1, label="Pictures")]


def launch(page: gr.Blocks, port: int | None = None) -> None:
    """Serve a page until it is interrupted, without anything from elsewhere."""
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    css = ".pixels img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"
    css += ".held .grid-wrap {min-height: 0; max-height: none}"
    css += ".held .grid-container {grid-template-columns: repeat(auto-fit, minmax(90px, 1fr))}"
    settings: dict[str, Any] = {"theme": theme, "css": css, "footer_links": [], "show_error": True}
    page.queue(max_size=32).launch(server_port=port, inbrowser=True, **settings)


def main(model: str | None, device: str | None, dtype: str, revision: str | None, port: int | None) -> None:
    """Serve the page of a model of pixels, by default of ddim-mnist-28; see `ddim-plugin demo --help`."""
    check_port(port)
    model = model or str(default_model())
    with explained(model if Path(model).is_dir() else f"{model} (no folder)"):
        pipe = GeneralizedDDIMPipeline.from_pretrained(model, revision=revision)
    pipe.to(device or get_device(), dtype=None if dtype == "float32" else getattr(torch, dtype))
    launch(Demo(pipe, held_out(model, revision)).page(Path(model).name), port)


if __name__ == "__main__":
    card = metadata_load(Path(__file__).with_name("README.md")) or {}  # of the Space
    model = [*(card.get("models") or ()), os.environ.get("SPACE_ID")][0]
    pipe = GeneralizedDDIMPipeline.from_pretrained(model).to(get_device())
    launch(Demo(pipe, held_out(model)).page(model))
