"""The samplers that are compared: ours, and those of diffusers with their grids."""

import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import diffusers

import ddim_plugin

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
KINDS = (
    ("dpmsolver++", "zero"),
    ("dpmsolver++", "sigma_min"),
    ("dpmsolver", "sigma_min"),
    ("sde-dpmsolver++", "zero"),
    ("sde-dpmsolver++", "sigma_min"),
)
OURS, FITTED, NOISY = "ours", "ours, fitted", "ours, η = 1"
PLAIN = ("DDIM", "Flow Euler")
"""η = 0 of diffusers, for tables of β and for flow matching."""

FAMILIES = (OURS, FITTED, NOISY)
"""The default, the solvers that were fitted to the model, and the default at η = 1."""

NOISELESS = {"tau_func": 0}
"""Makes SA-Solver deterministic."""

UNIFORM = {"uniform_sigmas": True}
"""σ = 1, …, 1/S before the shift, as pipelines of flow models pass them to their scheduler."""


class Unfit(Exception):
    """Raised if a sampler cannot run with a model, or at a number of evaluations."""


class Sampler(NamedTuple):
    """A scheduler and its settings, which its name lists."""

    family: str
    scheduler: str
    settings: dict[str, Any]

    @property
    def noisy(self) -> bool:
        """Whether the sampler adds noise."""
        stock = self.scheduler == "DDPMScheduler" or self.family.startswith("sde-")
        solver = self.scheduler == "SASolverScheduler" and "tau_func" not in self.settings
        return stock or solver or self.settings.get("eta", 0.0) > 0

    @property
    def name(self) -> str:
        """The family and the settings."""
        words = (k.removeprefix("use_") if v is True else str(v) for k, v in self.settings.items() if v is not False)
        return " ".join([self.family, *words])


def is_flow(saved: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's config is one of flow matching."""
    return saved["prediction_type"] == "flow_prediction" or bool(saved.get("use_flow_sigmas"))


def is_stock(family: str) -> bool:
    """Return whether a family is of diffusers."""
    return family not in FAMILIES


def samplers(flow: bool = False) -> Iterator[Sampler]:
    """Yield ours, and those of diffusers, each with its grids and kinds of prediction; `flow` those of flow models."""
    yield Sampler(OURS, "MultistepDDIMScheduler", {})
    yield Sampler(FITTED, "MultistepDDIMScheduler", {})
    yield Sampler(NOISY, "MultistepDDIMScheduler", {"eta": 1.0})
    yield from _of_flow() if flow else _of_betas()


def _of_flow() -> Iterator[Sampler]:
    """Yield the samplers of diffusers that have flow matching, on its grids of σ."""
    for grid in ({}, UNIFORM, *({sigmas: True} for sigmas in SIGMAS[1:4])):
        yield Sampler("Flow Euler", "FlowMatchEulerDiscreteScheduler", grid)
    yield Sampler("Flow Heun", "FlowMatchHeunDiscreteScheduler", {})
    for order in (2, 3):
        own: dict[str, Any] = {"solver_order": order}
        for kind, last in ((kind, last) for kind, last in KINDS if kind.endswith("++")):
            more = own | {"algorithm_type": kind, "final_sigmas_type": last}
            for form, name in (("M", "Multistep"), ("S", "Singlestep")):
                yield Sampler(f"{kind} {order}{form}", f"DPMSolver{name}Scheduler", more)
        yield Sampler(f"DEIS {order}", "DEISMultistepScheduler", own)
        for kind, data in product(("bh1", "bh2"), (True, False)):
            yield Sampler(f"UniPC {order}", "UniPCMultistepScheduler", own | {"solver_type": kind, "predict_x0": data})
        own = {"predictor_order": order}
        yield Sampler(f"SA-Solver {order}", "SASolverScheduler", own)
        yield Sampler(f"SA-Solver {order} ODE", "SASolverScheduler", own | NOISELESS)


def _of_betas() -> Iterator[Sampler]:
    """Yield the samplers of diffusers for a table of β."""
    for spacing in SPACINGS:
        grid = {"timestep_spacing": spacing}
        yield Sampler("DDIM", "DDIMScheduler", grid)
        yield Sampler("DDPM", "DDPMScheduler", grid)
        yield Sampler("PNDM", "PNDMScheduler", grid | {"skip_prk_steps": True})
        for order in (2, 3):
            yield Sampler(f"SA-Solver {order}", "SASolverScheduler", grid | {"predictor_order": order})
            yield Sampler(f"SA-Solver {order} ODE", "SASolverScheduler", grid | {"predictor_order": order} | NOISELESS)
        for sigmas in SIGMAS:
            yield from _of_sigmas(grid | ({sigmas: True} if sigmas else {}), single=spacing == SPACINGS[0])
    yield Sampler("iPNDM", "IPNDMScheduler", {})


def _of_sigmas(grid: dict[str, Any], single: bool) -> Iterator[Sampler]:
    """Yield the samplers that have several grids of σ; single-step ones, which have no spacing, if `single`."""
    for family in ("Euler", "LMS", "Heun", "KDPM2"):
        yield Sampler(family, f"{family}DiscreteScheduler", grid)
    for order in (2, 3):
        own = grid | {"solver_order": order}
        yield Sampler(f"DEIS {order}", "DEISMultistepScheduler", own)
        for kind, last in KINDS:
            more = own | {"algorithm_type": kind, "final_sigmas_type": last}
            yield Sampler(f"{kind} {order}M", "DPMSolverMultistepScheduler", more)
            if single:
                alone = {key: value for key, value in more.items() if key != "timestep_spacing"}
                yield Sampler(f"{kind} {order}S", "DPMSolverSinglestepScheduler", alone)
        for kind, data in product(("bh1", "bh2"), (True, False)):
            yield Sampler(f"UniPC {order}", "UniPCMultistepScheduler", own | {"solver_type": kind, "predict_x0": data})


def make_scheduler(sampler: Sampler, nfe: int, saved: Mapping[str, Any]) -> Any:
    """Build a sampler's scheduler with timesteps for exactly `nfe` evaluations, from the config of the model's own.

    Raises:
        Unfit: if the scheduler does not exist for this model or this number.
    """
    cls = getattr(ddim_plugin, sampler.scheduler, None) or getattr(diffusers, sampler.scheduler)
    known = inspect.signature(cls.__init__).parameters
    settings = {key: value for key, value in sampler.settings.items() if key not in UNIFORM}
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise Unfit(f"knows no {unknown[0]}")
    flow = is_flow(saved)
    if "prediction_type" not in known and saved["prediction_type"] != ("flow_prediction" if flow else "epsilon"):
        raise Unfit(f"knows no prediction_type {saved['prediction_type']}")
    if flow and is_stock(sampler.family):
        kept = {key: saved[key] for key in ("num_train_timesteps", "prediction_type")} | {"use_flow_sigmas": True}
        kept |= dict.fromkeys(("shift", "flow_shift"), max(saved["shift"], saved["flow_shift"]))
        saved = {key: value for key, value in kept.items() if key in known}
    changes = settings | {key: False for key in ("clip_sample", "thresholding") if key in known}
    if sampler.scheduler == "MultistepDDIMScheduler":
        changes["fitted_solvers"] = _fitted(nfe, saved) if sampler.family == FITTED else None
    if sampler.scheduler == "SASolverScheduler":
        changes["corrector_order"] = sampler.settings["predictor_order"]
        changes |= {"tau_func": lambda t: 0} if "tau_func" in sampler.settings else {}
    reason = ""
    for S in sorted(range(1, nfe + 3), key=lambda S: abs(S - nfe)):
        try:
            made = cls.from_config(dict(saved), **changes)
            made.set_timesteps(S, **({} if settings == sampler.settings else {"sigmas": [1 - i / S for i in range(S)]}))
        except Exception as error:  # diffusers refuses with exceptions of many kinds
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        if len(made.timesteps) == nfe:
            return made
        reason = reason or f"makes {len(made.timesteps)} evaluations of {S} steps"
    raise Unfit(reason)


def _fitted(nfe: int, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the solver that was fitted to the model for this number of steps."""
    solver = (saved.get("fitted_solvers") or {}).get(str(nfe))
    if solver is None:
        raise Unfit(f"no solver was fitted to the model for {nfe} steps")
    return {str(nfe): solver}
