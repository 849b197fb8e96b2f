"""Configs that stock schedulers read, with the settings they do not have under one key."""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any, ClassVar

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config

from ..process.moves import PREDICTIONS
from ..process.spacings import SIGMAS

KEY = "_ddim_plugin"  # entry of a scheduler's config with our settings, which stock schedulers keep but do not read
SAMPLER = "sampler"  # entry of `KEY` of an inverse scheduler; in version 0.1 with the constraints it switched off
CONSTRAINTS = ("clip_sample", "thresholding", "use_clipped_model_output")  # they change x̂0: such a step has no inverse
SOLVER = ("solver_order", "lower_order_final", "fitted_solvers")  # of `MultistepDDIMScheduler` only
OF_METHOD = ("timestep_spacing", "eta", "clip_sample", "use_clipped_model_output", "corrector_steps", *SOLVER)
STOCK_SPACINGS = ("leading", "trailing", "linspace")
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
STAND_IN = "trailing"  # spacing that is saved for stock schedulers in place of one that they do not have

# Settings of version 0.1 with their defaults, and values of others.
REMOVED = dict.fromkeys(["solver_quantity", "solver_coordinate", "solver_corrector", "solver_extrapolation"])
REMOVED |= {"start_from_top": True}
REMOVED_VALUES = {"timestep_spacing": ("few_steps_power", "log_snr"), "beta_schedule": ("exp",)}

# Stock schedulers whose keys configs of the three paths have, and those with `use_flow_sigmas` and grids of their own.
VP, FLOW, VE = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler"
EDM = "EDMEulerScheduler"  # variance exploding with a network that is preconditioned
FLOW_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
FLOW_SOLVERS += ("DEISMultistepScheduler", "SASolverScheduler")
EDM_SOLVERS = (EDM, "EDMDPMSolverMultistepScheduler")

# Settings of one path, refused on the others, and those that are copied with the default of the config's writer.
BETA = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "set_alpha_to_one", "rescale_betas_zero_snr")
SHIFT = ("use_flow_sigmas", "shift", "flow_shift", "use_dynamic_shifting")
OF_PATH = {VP: BETA, FLOW: SHIFT, VE: ("sigma_min", "sigma_max"), EDM: ("sigma_min", "sigma_max", "sigma_data")}
PROCESS = ("num_train_timesteps", "prediction_type", *BETA, *SHIFT, *OF_PATH[EDM])

OTHER_PROCESS = {"snr_shift_scale": 1.0, "timestep_type": "discrete", "stochastic_sampling": False}  # have no effect
CLASSES: dict[str, type["StockConfig"]] = {}  # schedulers of this package by name


def path_of(settings: dict[str, Any]) -> str:
    """Return the path of a scheduler with these settings, one of `OF_PATH`."""
    if settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction":
        return FLOW
    if settings.get("sigma_data") is not None or settings.get("prediction_type") == "edm":
        return EDM
    return VP if settings.get("sigma_max") is None else VE


def with_settings_of(base: type) -> Callable[[Callable], Callable]:
    """Decorate an `__init__` without a body, which then takes the settings of `base` too, in front of its own."""

    def decorate(init: Callable) -> Callable:
        known = {**inspect.signature(base.__init__).parameters, **inspect.signature(init).parameters}
        signature = inspect.Signature([*known.values()])

        def configured(self: Any, *args: Any, **kwargs: Any) -> None:
            signature.bind(self, *args, **kwargs)  # a TypeError for unknown settings
            self._build()

        configured.__signature__ = signature  # type: ignore[attr-defined]
        return register_to_config(configured)

    return decorate


@contextmanager
def all_or_nothing(scheduler: Any) -> Iterator[None]:
    """Give a scheduler its attributes back if what is done to it fails."""
    before = dict(vars(scheduler))
    try:
        yield
    except BaseException:
        scheduler.__dict__ = before
        raise


class StockConfig(SchedulerMixin, ConfigMixin):
    """Convert a scheduler's config to and from those of diffusers, without a warning."""

    _encodes: ClassVar[bool] = False  # an inverse scheduler, which does not take the constraints of a sampler

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        CLASSES[cls.__name__] = cls

    @property
    def _stock(self) -> str:
        path = path_of(self.config)
        return (path in (FLOW, EDM) and self.config.get("_writer")) or path

    def register_to_config(self, **kwargs: Any) -> None:
        """Record settings, and keep the config readable for stock schedulers."""
        super().register_to_config(**kwargs)
        known, foreign = defaults(type(self)), defaults(type(self)).keys() - defaults(getattr(diffusers, self._stock))
        names = {"eta", "eps_mean_square", "use_clipped_model_output", *SOLVER, *({"prediction_type"} & foreign)}
        names |= {key for key in foreign if self.config[key] != known[key]}
        named = {"timestep_spacing": STOCK_SPACINGS, "variance_type": ("fixed_large", "learned_range")}
        named |= {"prediction_type": PREDICTIONS[:-1]}
        names |= {key for key, stock in named.items() if self.config[key] not in stock}
        own = {key: self.config[key] for key in known if key in names} | ({SAMPLER: {}} if self._encodes else {})
        hidden = sorted(own.keys() | foreign)  # diffusers does not convert them
        own |= {"trained_betas": None} if self._derived_betas else {}
        same = path_of(self.config) == EDM and self.config.timestep_spacing in SIGMAS
        stock = {"_class_name": self._stock} | ({"sigma_schedule": self.config.timestep_spacing} if same else {})
        super().register_to_config(**{KEY: own, "_use_default_values": hidden} | stock)

    def to_json_string(self) -> str:
        """Write the config of the stock scheduler, with ours under `KEY`."""
        live, stock, saved = self._internal_dict, self._stock, copy(self)  # diffusers writes into the config
        own = {"class": type(self).__name__} | ({} if stock == VP else {"stock": stock}) | live[KEY]
        left_out = {*live["_use_default_values"], "_writer"}
        saved._internal_dict = FrozenDict({k: v for k, v in live.items() if k not in left_out})
        config = json.loads(super(StockConfig, saved).to_json_string()) | {KEY: own, "_class_name": stock}
        if stock == VP:
            config.setdefault("timestep_spacing", STAND_IN)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """Create a scheduler from the config of this or any compatible scheduler. `kwargs` override its settings.

        Our settings survive a conversion to a stock scheduler, unless changed there. Noise of a stock config other than
        "learned_range" is not copied: DDPM becomes DDIM. Raises ValueError for settings that are refused.
        """
        later = {}
        if isinstance(config, dict):
            known, given, (config, own, path) = defaults(cls), config, _split(config)
            writer = _writer(given, {FLOW: FLOW_SOLVERS, EDM: EDM_SOLVERS}.get(path, ()))
            if path == EDM and "sigma_schedule" in kwargs:
                kwargs.setdefault("timestep_spacing", kwargs["sigma_schedule"])
            if path != VP:
                of_stock = defaults(getattr(diffusers, writer or path))  # with settings that we have no name for
                later = {key: kwargs.pop(key, config.pop(key, of_stock[key])) for key in of_stock.keys() - known}
                config |= {"_writer": writer} if writer else {}
            if path == FLOW and kwargs.get("prediction_type", "flow_prediction") != "flow_prediction":
                kwargs.setdefault("use_flow_sigmas", True)  # on the same path
            sampler = own.pop(SAMPLER, None)  # constraints in the config of an inverse scheduler were passed to it
            free = dict.fromkeys(CONSTRAINTS, False) if sampler is None else {}
            own |= free if cls._encodes else sampler or {}
            config, own = _of_method(config, own, known)
            kwargs = {k: v for k, v in own.items() if k in known} | kwargs
        created = super().from_config(config, return_unused_kwargs, **kwargs)
        if later:
            (created[0] if return_unused_kwargs else created).register_to_config(**later)
        return created


@cache
def defaults(cls: type | None) -> dict[str, Any]:
    """Return the settings of a scheduler's class with their defaults."""
    parameters = {} if cls is None else inspect.signature(cls.__init__).parameters
    return {key: each.default for key, each in parameters.items() if each.default is not each.empty}


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Split a config into stock settings and ours (without those changed since, or only in 0.1), and find its path."""
    of_writer = defaults(getattr(diffusers, str(config.get("_class_name")), None))
    # In memory diffusers lists the keys left to defaults. On disk a value equal to its default counts as not set.
    unset = config.get("_use_default_values", [key for key in config if of_writer.get(key, KEY) == config[key]])
    name, known = config.get("_class_name", "this config"), of_writer | dict(config)
    is_edm = _writer(config, EDM_SOLVERS) and "beta_schedule" not in config.keys() - {*unset}
    is_flow = path_of(known) == FLOW or ("shift" in known and "beta_schedule" not in known)
    is_exploding = name == VE or ("sigma_max" in known and not {"beta_schedule", "sigma_data"} & known.keys())
    path = EDM if is_edm else FLOW if is_flow else VE if is_exploding else VP
    others = of_writer or {"_use_default_values", "sigma_data"} & known.keys()
    if path == VP and ("num_classes" in known or ("beta_schedule" not in known and others)):
        raise ValueError(f"{name} belongs to another family of models: pass one with β or σ, such as DDIMScheduler")
    for key, neutral in OTHER_PROCESS.items():
        if known.get(key, neutral) != neutral:
            raise ValueError(f"{key}={known[key]!r} is of another process: use another model, or eta for its noise")
    dropped = {key for keys in OF_PATH.values() for key in keys if key not in OF_PATH[path]}
    dropped |= {"timestep_spacing", "steps_offset"} if path == FLOW else set()  # of tables of β
    settings = {key: known[key] for key in (*PROCESS, *config) if key in known and key not in dropped}
    if path != VP:
        settings.setdefault("prediction_type", "flow_prediction" if path == FLOW else "score")
    own, variance = dict(settings.pop(KEY, None) or {}), settings.get("variance_type")
    if path == EDM:
        if known.get("final_sigmas_type", "zero") != "zero":
            raise ValueError(f"final_sigmas_type={known['final_sigmas_type']!r} ends above the data: set it to 'zero'")
        settings |= {"prediction_type": "edm"} if settings["prediction_type"] == "epsilon" else {}
        for place in [settings, own] if own.get("timestep_spacing") in SIGMAS else [settings]:  # the same setting
            place["timestep_spacing"] = known["sigma_schedule"]
    if times := own.pop("fitted_timesteps", None):  # of version 0.1
        own["fitted_solvers"] = {S: {"timesteps": each} for S, each in times.items()} | own.get("fitted_solvers", {})
    if variance is None or (KEY not in config and variance.startswith("fixed_")):
        settings.pop("variance_type", None)
    lost = {}
    for place in (settings, own):
        gone = [key for key, value in place.items() if key in REMOVED or value in REMOVED_VALUES.get(key, ())]
        lost |= {key: value for key in gone if (value := place.pop(key)) != REMOVED.get(key, KEY)}
    if "beta_schedule" in lost:
        own.pop("trained_betas", None)  # 0.1 saved β itself beside the name
    if lost:
        named = ", ".join(f"{key}={value!r}" for key, value in lost.items())
        warnings.warn(f"version 0.2 does not support {named}: the defaults and saved β are used", stacklevel=3)
    changed = (config.keys() & settings.keys()) - {*unset, "trained_betas"}
    if "class" in own:
        replaced = path != EDM and settings.get("timestep_spacing", STAND_IN) != STAND_IN
        changed = changed | {"timestep_spacing"} if replaced else changed - {"timestep_spacing"}
    settings["_use_default_values"] = [key for key in config.get("_use_default_values", ()) if key not in PROCESS]
    return settings, {key: value for key, value in own.items() if key not in changed}, path


def _of_method(settings: dict[str, Any], own: dict[str, Any], known: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Leave out τ, noise and clipping that were chosen for another method, but not "learned_range" or thresholding."""
    if (SOLVER[0] in own) == (SOLVER[0] in known):
        return settings, own
    if SOLVER[0] in own:  # written by a multistep scheduler
        spacing = {"timestep_spacing"} if own.get("timestep_spacing") in ("few_steps", "few_steps_noise") else set()
        return settings, {k: v for k, v in own.items() if k not in {"use_flow_sigmas", *spacing}}
    learned = "learned_range" in (settings.get("variance_type"), own.get("variance_type"))
    dropped = {*OF_METHOD} if learned else {*OF_METHOD, "variance_type"}
    settings, own = ({k: v for k, v in each.items() if k not in dropped} for each in (settings, own))
    if path_of(settings) == FLOW:
        settings["use_flow_sigmas"] = True  # pipelines such as Flux then leave σ to the scheduler
    return settings, own


def _writer(config: dict[str, Any], names: Sequence[str]) -> str | None:
    """Find the stock scheduler among `names` that a config belongs to. In memory it has no name."""
    if "_class_name" in config:
        return config["_class_name"] if config["_class_name"] in names else None
    known = {key for key in config if not key.startswith("_")}
    return next((each for each in names if defaults(getattr(diffusers, each)).keys() == known), None)


def restored(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler of this package that was saved as this stock one, and others unchanged."""
    own = scheduler.config.get(KEY)
    own = own if isinstance(own, dict) and type(scheduler).__name__ == own.get("stock", VP) else {}
    return CLASSES[own["class"]].from_config(scheduler.config) if own.get("class") in CLASSES else scheduler


def restore_scheduler(pipe: Any) -> Any:
    """Restore the schedulers that a pipeline was saved with, and return it. Raises ValueError if none is ours."""
    for name, part in pipe.components.items():
        if isinstance(part, SchedulerMixin):
            setattr(pipe, name, restored(part))
    if not isinstance(pipe.scheduler, StockConfig):
        remedy = "create a scheduler with GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)"
        raise ValueError(f"the config of this {type(pipe.scheduler).__name__} has no {KEY!r} entry: {remedy}")
    return pipe


def to_json_string(self: DiffusionPipeline) -> str:
    """Write `model_index.json` with the stock class of our scheduler, which `restore_scheduler` brings back."""
    index = json.loads(_written(self))
    for name in index:
        if isinstance(component := vars(self).get(name), StockConfig):
            index[name] = ["diffusers", component.config["_class_name"]]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


_written, DiffusionPipeline.to_json_string = DiffusionPipeline.to_json_string, to_json_string
