"""Freezes what the four schedulers compute, for `test_core.py`; or says how far this version is from it.

python tests/golden/freeze_core.py tests/golden/frozen/core.npz
python tests/golden/freeze_core.py --compare tests/golden/frozen/core.npz

`core.npz` holds what version 0.1 computed, but for 35 cases of 8 steps or more that have other defaults in 0.2: the
spacing "few_steps", and 4 as the order of multistep methods. Freeze it anew only if a case is added, and then with the
version of each case first on PYTHONPATH.
"""

import sys
import warnings
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from ddim_plugin import (
    GeneralizedDDIMScheduler,
    InverseDDIMScheduler,
    InverseMultistepDDIMScheduler,
    MultistepDDIMScheduler,
)

SHAPE = (2, 1, 2, 2)
T = 1000
PREDICTIONS = ("epsilon", "sample", "v_prediction")
FIXED_SPACINGS = ("linear", "quadratic", "leading", "trailing", "linspace")
SPACINGS = (*FIXED_SPACINGS, "few_steps", "few_steps_noise", "paper_linear", "paper_quadratic")
FROM_TIME_1 = ("leading", "linspace", "paper_linear", "paper_quadratic")
"""Spacings whose solver extrapolated too far in 0.1: near the data with noise, and upwards from a very short step."""

CONSTRAINTS: dict[str, dict[str, Any]] = {
    "free": {},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "clip+eps": {"clip_sample": True, "clip_sample_range": 0.8, "use_clipped_model_output": True},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    "threshold+eps": {
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.8,
        "sample_max_value": 1.5,
        "use_clipped_model_output": True,
    },
}
FITTED = {"3": [870, 400, 30], "5": [920, 700, 450, 180, 20]}
EPS_MEAN_SQUARE = [0.4 + 0.58 * t / T for t in range(T)]
NOISES = (
    ("fixed_small", 0.0),
    ("fixed_small", 0.3),
    ("fixed_small", 1.0),
    ("fixed_large", 1.0),
    ("optimal", 0.0),
    ("optimal", 0.3),
    ("optimal", 1.0),
    ("learned_range", 1.0),
)
KEPT = ("prev_sample", "pred_original_sample", "pred_epsilon", "mean", "std")


class Case(NamedTuple):
    """A scheduler, its config, arguments of `set_timesteps`, and arguments of every `step`."""

    scheduler: type
    config: dict[str, Any]
    plan: dict[str, Any]
    step: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        config = {k: v for k, v in self.config.items() if k not in ("eps_mean_square", "trained_betas")}
        parts = [self.scheduler.__name__.replace("DDIMScheduler", "")]
        parts += [f"{key}={value}" for each in (config, self.plan, self.step or {}) for key, value in each.items()]
        return ",".join(parts).replace(" ", "")


def noise(variance_type: str, eta: float) -> dict[str, Any]:
    """The settings of a kind of noise."""
    optimal = {"eps_mean_square": EPS_MEAN_SQUARE} if variance_type == "optimal" else {}
    return {"variance_type": variance_type, "eta": eta} | optimal


def steps(S: int) -> dict[str, Any]:
    return {"num_inference_steps": S}


def generalized() -> list[Case]:
    cls = GeneralizedDDIMScheduler
    cases = [Case(cls, {}, steps(10))]
    for spacing, S in product(SPACINGS, (1, 2, 7, 10, 50, 999, T)):
        cases.append(Case(cls, {"timestep_spacing": spacing, "eta": 0.3}, steps(S)))
    for prediction, spacing in product(PREDICTIONS[1:], SPACINGS):
        cases.append(Case(cls, {"prediction_type": prediction, "timestep_spacing": spacing}, steps(10)))
    for prediction, kind, constraint in product(PREDICTIONS, NOISES, CONSTRAINTS):
        config = {"prediction_type": prediction} | noise(*kind) | CONSTRAINTS[constraint]
        cases.append(Case(cls, config, steps(7)))
    for prediction, spacing, eta in product(PREDICTIONS, ("leading", "trailing"), (0.0, 1.0)):
        config = {"prediction_type": prediction, "timestep_spacing": spacing, "eta": eta, "set_alpha_to_one": False}
        cases.append(Case(cls, config, steps(7)))
    for prediction, spacing, eta in product(PREDICTIONS[1:], ("linear", "leading", "trailing"), (0.0, 0.3, 1.0)):
        config = {"prediction_type": prediction, "timestep_spacing": spacing, "eta": eta}
        cases.append(Case(cls, config | {"rescale_betas_zero_snr": True}, steps(7)))
    for constraint in ("clip", "clip+eps", "threshold"):
        config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True} | CONSTRAINTS[constraint]
        cases.append(Case(cls, config, steps(7)))
    for name, prediction in product(
        ("scaled_linear", "squaredcos_cap_v2", "const", "jsd", "sigmoid", "laplace"), PREDICTIONS[1:]
    ):
        cases.append(Case(cls, {"prediction_type": prediction, "beta_schedule": name, "eta": 0.3}, steps(7)))
    for name in ("scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        config = {"beta_schedule": name, "timestep_spacing": "leading", "steps_offset": 1}
        cases.append(Case(cls, config, steps(7)))
    stable_diffusion = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stable_diffusion |= {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    cases += [Case(cls, stable_diffusion, steps(S)) for S in (1, 10, 50)]
    given = {"num_train_timesteps": 20, "trained_betas": [0.01 + 0.02 * i for i in range(20)]}
    cases += [Case(cls, given | noise("fixed_small", eta), steps(S)) for eta in (0.0, 1.0) for S in (1, 3, 20)]
    times = {"timesteps": [981, 777, 500, 41, 0]}
    cases += [Case(cls, {"prediction_type": each, "eta": 0.3}, times) for each in PREDICTIONS]
    cases += [Case(cls, {}, steps(7), {"eta": eta}) for eta in (0.3, 1.0, 1.02)]
    cases.append(Case(cls, CONSTRAINTS["clip"], steps(7), {"use_clipped_model_output": True}))
    return cases


def inverse() -> list[Case]:
    cls = InverseDDIMScheduler
    cases = [Case(cls, {}, steps(10))]
    for spacing, S in product(SPACINGS, (1, 2, 7, 50)):
        cases.append(Case(cls, {"timestep_spacing": spacing}, steps(S)))
    for prediction, spacing in product(PREDICTIONS[1:], SPACINGS):
        cases.append(Case(cls, {"prediction_type": prediction, "timestep_spacing": spacing}, steps(10)))
    for prediction in PREDICTIONS:
        of = {"prediction_type": prediction}
        cases.append(Case(cls, of, steps(T)))
        cases.append(Case(cls, of, {"timesteps": [981, 777, 500, 41, 0]}))
        cases.append(Case(cls, of | {"timestep_spacing": "leading", "set_alpha_to_one": False}, steps(7)))
        cases.append(Case(cls, of | {"beta_schedule": "squaredcos_cap_v2"}, steps(7)))
    for S in (2, 7):
        cases.append(Case(cls, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, steps(S)))
    return cases


def multistep() -> list[Case]:
    cls = MultistepDDIMScheduler
    cases = [Case(cls, {}, steps(10)), Case(cls, {"eta": 1.0}, steps(10)), Case(cls, {"eta": 0.3}, steps(10))]
    for order, prediction, eta in product((None, 1, 2, 3, 4), PREDICTIONS, (0.0, 0.3, 1.0)):
        cases.append(Case(cls, {"solver_order": order, "prediction_type": prediction, "eta": eta}, steps(7)))
    for spacing, S, eta in product(SPACINGS, (1, 2, 5, 10, 50), (0.0, 1.0)):
        if not (eta and S >= 5 and spacing in (*FROM_TIME_1, "quadratic")):
            cases.append(Case(cls, {"timestep_spacing": spacing, "eta": eta}, steps(S)))
    cases += [Case(cls, {"prediction_type": each}, steps(T)) for each in PREDICTIONS]
    for prediction, kind, constraint in product(PREDICTIONS, NOISES, CONSTRAINTS):
        config = {"prediction_type": prediction} | noise(*kind) | CONSTRAINTS[constraint]
        cases.append(Case(cls, config, steps(6)))
    for order, eta, S in product((None, 2, 4), (0.0, 0.3, 1.0), (1, 6)):
        cases.append(Case(cls, {"solver_order": order, "eta": eta, "lower_order_final": True}, steps(S)))
    for eta, S in product((0.0, 0.3, 1.0), (3, 4, 5)):
        cases.append(Case(cls, {"fitted_timesteps": FITTED, "eta": eta}, steps(S)))
    for prediction, spacing, eta in product(PREDICTIONS[1:], ("linear", "few_steps", "leading"), (0.0, 1.0)):
        config = {"prediction_type": prediction, "timestep_spacing": spacing, "eta": eta}
        if not (eta and spacing in FROM_TIME_1):
            cases.append(Case(cls, config | {"rescale_betas_zero_snr": True}, steps(6)))
    for prediction in PREDICTIONS:
        config = {"prediction_type": prediction, "eta": 0.0, "set_alpha_to_one": False, "timestep_spacing": "leading"}
        cases.append(Case(cls, config, steps(6)))
    for name in ("scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"):
        cases += [Case(cls, {"beta_schedule": name, "eta": eta}, steps(6)) for eta in (0.0, 1.0)]
    for prediction, eta in product(PREDICTIONS, (0.0, 1.0)):
        cases.append(Case(cls, {"prediction_type": prediction}, steps(8) | {"eta": eta}, {"eta": eta}))
        times = [981, 777, 500, 41, 0]
        if eta:
            cases.append(Case(cls, {"prediction_type": prediction}, {"timesteps": times}, {"eta": eta}))
        else:  # 0.1 began at T with explicit timesteps too
            cases.append(Case(cls, {"prediction_type": prediction, "fitted_timesteps": {"5": times}}, steps(5)))
    cases.append(Case(cls, {"variance_type": "learned_range"}, steps(6)))
    return cases


def inverse_multistep() -> list[Case]:
    cls = InverseMultistepDDIMScheduler
    cases = [Case(cls, {}, steps(10))]
    for order, prediction, S in product((None, 1, 2, 3, 4), PREDICTIONS, (2, 7)):
        cases.append(Case(cls, {"solver_order": order, "prediction_type": prediction}, steps(S)))
    for spacing, S in product(SPACINGS, (1, 2, 5, 50)):
        if not (S in (2, 5) and spacing in FROM_TIME_1):
            cases.append(Case(cls, {"timestep_spacing": spacing}, steps(S)))
    cases += [Case(cls, {"lower_order_final": True, "prediction_type": each}, steps(6)) for each in PREDICTIONS]
    cases += [Case(cls, {"fitted_timesteps": FITTED}, steps(S)) for S in (3, 4, 5)]
    for prediction in PREDICTIONS:
        of = {"prediction_type": prediction}
        cases.append(Case(cls, of | {"timestep_spacing": "leading", "set_alpha_to_one": False}, steps(6)))
        cases.append(Case(cls, of | {"beta_schedule": "squaredcos_cap_v2"}, steps(6)))
    cases.append(Case(cls, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, steps(6)))
    return cases


def numbers(seed: int) -> torch.Tensor:
    """A sample of fixed numbers in [−1.6, 1.6], made from integers: the same on every machine."""
    count = int(np.prod(SHAPE))
    values = [((37 * (seed + 3) * (k + 2) + 11 * k * k) % 97 - 48) / 30 for k in range(count)]
    return torch.tensor(values, dtype=torch.float64).view(SHAPE)


def network(x: torch.Tensor, timestep: float, learned: bool) -> torch.Tensor:
    """A smooth function of the sample and the timestep, with a second half if a variance is learned."""
    out = torch.tanh(0.9 * x + 0.1) + 0.05 * torch.sin(3 * x.flip(-1)) + 0.0001 * timestep
    return torch.cat([out, torch.tanh(0.5 * x.flip(-2) - 0.2)], dim=1) if learned else out


def selected(count: int) -> set[int]:
    """Places of the steps that are kept of so many."""
    return {0, count // 2, count - 1}


def run(case: Case, nudge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps of a case, and `KEPT` after the selected steps: (steps, 5, 8), float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = {"refinement_steps": None} if case.scheduler is InverseDDIMScheduler else {}  # 0.1 had no other inverse
        config = dict(case.config)
        if fitted := config.pop("fitted_timesteps", None):  # which 0.1 had
            config["fitted_solvers"] = {S: {"timesteps": times} for S, times in fitted.items()}
        scheduler = case.scheduler(**config, **plain)
        scheduler.set_timesteps(**case.plan)
    x, rows = numbers(0), []
    places = selected(len(scheduler.timesteps))
    for i, timestep in enumerate(scheduler.timesteps):
        output = network(x, float(timestep), case.config.get("variance_type") == "learned_range") * (1 + nudge)
        out = scheduler.step(output, timestep, x, variance_noise=numbers(i + 1), **(case.step or {}))
        x = out.prev_sample
        if i in places:
            rows.append([getattr(out, key).double().expand(SHAPE).flatten().tolist() for key in KEPT])
    return scheduler.timesteps.numpy().astype(np.int16), np.array(rows)


CASES = {case.name: case for case in (*generalized(), *inverse(), *multistep(), *inverse_multistep())}


def freeze(file: str) -> None:
    """Write what this version computes."""
    times, values = zip(*(run(case) for case in CASES.values()), strict=True)
    lengths = np.array([[len(t), len(v)] for t, v in zip(times, values, strict=True)], dtype=np.int16)
    np.savez_compressed(
        file,
        names=np.array(list(CASES)),
        lengths=lengths,
        times=np.concatenate(times),
        values=np.concatenate(values).transpose(1, 0, 2),  # equal quantities beside each other: smaller
    )


def frozen(file: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Timesteps and values of each case that was frozen, by its name."""
    with np.load(file) as kept:
        ends = kept["lengths"].astype(np.int64).cumsum(axis=0)[:-1]
        times = np.split(kept["times"], ends[:, 0])
        values = np.split(kept["values"].transpose(1, 0, 2), ends[:, 1])
        return dict(zip(kept["names"].tolist(), zip(times, values, strict=True), strict=True))


def distance(value: np.ndarray, other: np.ndarray) -> float:
    """The largest |value − other| relative to max(1, |other|)."""
    return float((np.abs(value - other) / np.maximum(1, np.abs(other))).max())


def compare(file: str) -> None:
    """Print how far this version is from what was frozen."""
    found = frozen(file)
    far = {}
    for name, case in CASES.items():
        times, values = run(case)
        same = np.array_equal(times, found[name][0])
        far[name] = distance(values, found[name][1]) if same else float("inf")
    for name in sorted(far, key=far.get, reverse=True)[:10]:
        print(f"{far[name]:.1e}  {name}")


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        compare(sys.argv[2])
    else:
        freeze(sys.argv[1])
