"""Configs that stock schedulers read: a DDIMScheduler's, with the settings it does not have under one key."""

import inspect
import json
import warnings
from typing import Any

import diffusers
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, FrozenDict

KEY = "_ddim_plugin"
"""Entry of a scheduler's config with the settings of this package. Stock schedulers keep it, and do not read it."""

SAMPLER = "sampler"  # entry of `KEY` with the constraints that an inverse scheduler switched off
CONSTRAINTS = ("clip_sample", "thresholding", "use_clipped_model_output")
"""Settings that change x̂0. A step with one of them has no inverse."""

SOLVER = ("solver_order", "lower_order_final", "fitted_timesteps")  # settings that only `MultistepDDIMScheduler` has
STOCK_SPACINGS = ("leading", "trailing", "linspace")
STOCK_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
STOCK_VARIANCES = ("fixed_large", "learned_range")  # "fixed_small" is their default
STAND_IN = "trailing"  # spacing that is saved for stock schedulers in place of one that they do not have
REMOVED: dict[str, Any] = dict.fromkeys([f"solver_{what}" for what in ("quantity", "coordinate", "corrector")])
REMOVED |= {"solver_extrapolation": None, "start_from_top": True}  # settings of version 0.1, with their defaults
REMOVED_SPACINGS = ("few_steps_power", "log_snr")

PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
PROCESS += ("set_alpha_to_one", "rescale_betas_zero_snr")  # copied with the default of the class that wrote the config
OTHER_PROCESS = {"snr_shift_scale": 1.0, "use_flow_sigmas": False, "timestep_type": "discrete"}
"""Settings of other processes, with the values at which they do nothing."""

CLASSES: dict[str, type["StockConfig"]] = {}  # schedulers of this package by name


class StockConfig(SchedulerMixin, ConfigMixin):
    """Convert a scheduler's config to and from those of diffusers, without a warning."""

    _derived_betas = False  # trained_betas were computed from a schedule that stock schedulers do not have
    _set_aside: tuple[str, ...] = ()  # constraints of the sampler that an inverse scheduler switched off

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        CLASSES[cls.__name__] = cls

    def _own_settings(self) -> dict[str, Any]:
        """Collect the settings that a stock scheduler does not have."""
        names = ("eta", "eps_mean_square", "use_clipped_model_output", *SOLVER)
        own = {key: self.config[key] for key in names if key in self.config}
        if self.config.timestep_spacing not in STOCK_SPACINGS:
            own["timestep_spacing"] = self.config.timestep_spacing
        if self.config.variance_type not in STOCK_VARIANCES:
            own["variance_type"] = self.config.variance_type
        if self._derived_betas:
            own["trained_betas"] = None
        return own

    def register_to_config(self, **kwargs: Any) -> None:
        """Record settings, and keep the config readable for stock schedulers.

        diffusers does not convert keys in `_use_default_values`, but copies private keys such as `KEY`. `_class_name`
        is the stock scheduler whose keys these are.
        """
        super().register_to_config(**kwargs)
        own = self._own_settings()
        hidden = [key for key in own if key != "trained_betas"]
        super().register_to_config(**{KEY: own, "_use_default_values": hidden, "_class_name": DDIMScheduler.__name__})

    def to_json_string(self) -> str:
        """Write the config of a stock `DDIMScheduler`, with ours under `KEY`."""
        live = self._internal_dict
        own = {"class": type(self).__name__} | live[KEY]
        try:
            self._internal_dict = FrozenDict({k: v for k, v in live.items() if k not in live["_use_default_values"]})
            config = json.loads(super().to_json_string())
        finally:
            self._internal_dict = live
        config |= {KEY: own, "_class_name": DDIMScheduler.__name__}
        config.setdefault("timestep_spacing", STAND_IN)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """Create a scheduler from the config of this or any compatible scheduler. `kwargs` override its settings.

        Settings of this package survive a conversion to a stock scheduler, unless they were changed there. A stock
        config's "fixed_small" and "fixed_large" noise is not copied, so that a DDPM checkpoint becomes DDIM. Raises
        ValueError for settings that `__init__` refuses, and for `kwargs` that only version 0.1 had.
        """
        removed, aside = REMOVED.keys() & kwargs.keys(), ()
        if removed:
            key = min(removed)
            raise ValueError(f"{key}={kwargs[key]!r} is no setting since version 0.2: leave it out")
        if isinstance(config, dict):
            config, own = cls._adapt(*_split(config))
            aside = tuple(key for key in own.get(SAMPLER, ()) if key not in kwargs)
            kwargs = {k: v for k, v in own.items() if k in inspect.signature(cls.__init__).parameters} | kwargs
        created = super().from_config(config, return_unused_kwargs, **kwargs)
        if aside:
            scheduler = created[0] if return_unused_kwargs else created
            scheduler._set_aside = aside
            scheduler.register_to_config()
        return created

    @classmethod
    def _adapt(cls, settings: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Drop settings of other classes, and restore a sampler's constraints."""
        own |= own.pop(SAMPLER, {})
        if SOLVER[0] in own and own.get("timestep_spacing") in ("few_steps", "few_steps_noise"):
            own.pop("timestep_spacing")
        return settings, own


def _split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a config into stock settings and ours, without ours that were changed since, or that only 0.1 had.

    In memory diffusers lists the keys that were left to the defaults of the class that wrote the config. On disk a
    value equal to such a default counts as not set.
    """
    writer = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = {} if writer is None else inspect.signature(writer.__init__).parameters
    defaults = {key: each.default for key, each in parameters.items() if each.default is not each.empty}
    unset = config.get("_use_default_values", [key for key in config if defaults.get(key, KEY) == config[key]])
    name, known = config.get("_class_name", "this config"), defaults | dict(config)
    if "beta_schedule" not in known and (defaults or {"_use_default_values", "shift", "sigma_data"} & known.keys()):
        raise ValueError(f"{name} belongs to another family of models: pass a scheduler with β, such as DDIMScheduler")
    for key, neutral in OTHER_PROCESS.items():
        if known.get(key, neutral) != neutral:
            raise ValueError(f"{key}={known[key]!r} of {name} is of another process, which is not supported yet")
    settings = {key: known[key] for key in PROCESS if key in known} | dict(config)
    carried = settings.pop(KEY, None)
    own = {} if carried is None else dict(carried)
    variance = settings.get("variance_type")
    if variance is None or (carried is None and variance.startswith("fixed_")):
        settings.pop("variance_type", None)
    _drop_removed(settings, own)
    changed = (config.keys() & settings.keys()) - {*unset, "trained_betas"}
    if "class" in own:
        replaced = settings.get("timestep_spacing", STAND_IN) != STAND_IN
        changed = changed | {"timestep_spacing"} if replaced else changed - {"timestep_spacing"}
    if SAMPLER in own and any(settings.get(key) for key in CONSTRAINTS):
        own[SAMPLER] = {}
    settings["_use_default_values"] = [key for key in config.get("_use_default_values", ()) if key not in PROCESS]
    return settings, {key: value for key, value in own.items() if key not in changed}


def _drop_removed(settings: dict[str, Any], own: dict[str, Any]) -> None:
    """Drop settings that only version 0.1 had, with one warning if one of them had another value than its default."""
    lost = {}
    for place in (settings, own):
        found = {key: place.pop(key) for key in REMOVED if key in place}
        lost |= {key: value for key, value in found.items() if value != REMOVED[key]}
        if place.get("timestep_spacing") in REMOVED_SPACINGS:
            lost["timestep_spacing"] = place.pop("timestep_spacing")
        if place.get("beta_schedule") == "exp":
            lost["beta_schedule"] = place.pop("beta_schedule")
            own.pop("trained_betas", None)  # 0.1 saved β itself beside the name
    if lost:
        named = ", ".join(f"{key}={value!r}" for key, value in lost.items())
        kept = " β is taken from trained_betas." if "beta_schedule" in lost else ""
        warnings.warn(f"version 0.2 does not support {named}: the defaults are used instead.{kept}", stacklevel=4)


def restored(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler of this package that was saved as this stock one, and others unchanged."""
    own = scheduler.config.get(KEY) if type(scheduler) is DDIMScheduler else None
    cls = CLASSES.get(own.get("class", "")) if isinstance(own, dict) else None
    return scheduler if cls is None else cls.from_config(scheduler.config)


def restore_scheduler(pipe: Any) -> Any:
    """Replace a pipeline's stock schedulers by those of this package that it was saved with, and return it.

    `pipe` is any pipeline of diffusers. Raises ValueError if the config of its scheduler has no settings of ours.
    """
    for name, part in pipe.components.items():
        if isinstance(part, SchedulerMixin):
            setattr(pipe, name, restored(part))
    scheduler = pipe.scheduler
    if not isinstance(scheduler, StockConfig):
        raise ValueError(
            f"the config of this {type(scheduler).__name__} has no {KEY!r} entry: create a scheduler with "
            "GeneralizedDDIMScheduler.from_config(pipe.scheduler.config)"
        )
    return pipe
