"""Freezes configs that version 0.1 wrote, and the settings that it read from them, for `test_configs.py`.

python tests/golden/freeze_configs.py tests/golden/frozen/configs.json

Run it with version 0.1 first on PYTHONPATH: `configs.json` is what later versions must read in the same way.
"""

import json
import sys
import warnings

import diffusers

import ddim_plugin

CLASSES = (
    "GeneralizedDDIMScheduler",
    "InverseDDIMScheduler",
    "MultistepDDIMScheduler",
    "InverseMultistepDDIMScheduler",
)
STOCK = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler")
SHORT = {"num_train_timesteps": 12, "beta_start": 0.01, "beta_end": 0.6}
WRITTEN = {
    "GeneralizedDDIMScheduler": [
        {},
        {"timestep_spacing": "quadratic", "eta": 0.3, "beta_schedule": "scaled_linear", "beta_end": 0.013},
        {"timestep_spacing": "trailing", "variance_type": "fixed_large", "prediction_type": "v_prediction"},
        {
            "timestep_spacing": "few_steps_noise",
            "eta": 0.7,
            "rescale_betas_zero_snr": True,
            "prediction_type": "sample",
        },
        {"clip_sample": True, "use_clipped_model_output": True, "clip_sample_range": 2.0},
        {"thresholding": True, "sample_max_value": 1.5, "variance_type": "learned_range"},
        {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
        {**SHORT, "beta_schedule": "sigmoid"},
        {"num_train_timesteps": 12, "beta_schedule": "jsd", "timestep_spacing": "paper_linear"},
        {"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]},
        {**SHORT, "variance_type": "optimal", "eps_mean_square": [0.5] * 12},
    ],
    "InverseDDIMScheduler": [{}, {"timestep_spacing": "quadratic"}, {"clip_sample": True}],
    "MultistepDDIMScheduler": [
        {},
        {"solver_order": 2, "lower_order_final": True, "timestep_spacing": "quadratic", "eta": 0.2},
        {"fitted_solvers": {"2": {"timesteps": [900, 100]}}, "prediction_type": "v_prediction"},
        {"clip_sample": True, "timestep_spacing": "leading", "steps_offset": 1},
        {"variance_type": "learned_range", "thresholding": True},
    ],
    "InverseMultistepDDIMScheduler": [{}, {"solver_order": 2, "timestep_spacing": "linspace"}],
}


def settings(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def as_json(scheduler):
    return json.loads(scheduler.to_json_string())


def read(name, config):
    """The settings that a class reads from a config, or None if it refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return settings(getattr(ddim_plugin, name).from_config(config))
        except ValueError:
            return None


def written():
    """Configs as 0.1 wrote them, directly and by way of stock schedulers, and by stock schedulers alone."""
    configs = [as_json(getattr(diffusers, stock)()) for stock in STOCK]
    for name, each in WRITTEN.items():
        for own in each:
            ours = getattr(ddim_plugin, name)(**own)
            configs.append(as_json(ours))
            if name == "GeneralizedDDIMScheduler" and own.get("timestep_spacing") == "paper_linear":
                continue
            configs += [as_json(getattr(diffusers, stock).from_config(ours.config)) for stock in STOCK[:3]]
    sampler = ddim_plugin.GeneralizedDDIMScheduler(clip_sample=True, timestep_spacing="quadratic")
    for name in (CLASSES[1], CLASSES[3]):
        up = getattr(ddim_plugin, name).from_config(sampler.config)
        configs += [as_json(up), as_json(diffusers.DDIMScheduler.from_config(up.config))]
    return configs


def freeze(file):
    """Write the configs, and of what was read the settings that are not a class's defaults."""
    defaults = {name: settings(getattr(ddim_plugin, name)()) for name in CLASSES}
    lines = []
    for config in written():
        found = {name: read(name, config) for name in CLASSES}
        changed = {
            name: each and {key: value for key, value in each.items() if (key, value) not in defaults[name].items()}
            for name, each in found.items()
        }
        lines.append(json.dumps({"config": config, "read": changed}, ensure_ascii=False, sort_keys=True))
    with open(file, "w") as out:
        out.write(f'{{"defaults": {json.dumps(defaults, sort_keys=True)},\n"cases": [\n' + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    freeze(sys.argv[1])
