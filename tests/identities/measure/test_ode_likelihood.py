"""The ODE's likelihood against data whose likelihood is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian_data import ALPHA, FLOW, MEAN, PATH, VARIANCE, data, exact_network
from measure.bound import BITS
from measure.ode import angles_of, ode_bits, ode_log_density, time_of
from torch import Generator

from ddim_plugin.process.paths import variance_exploding


@pytest.mark.parametrize("hutchinson", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_likelihood_of_the_ode_is_the_datas(hutchinson, prediction_type):
    x0, eps = data(8), exact_network(PATH)
    angles = np.arccos(np.sqrt(ALPHA))

    def network(x, t):
        if prediction_type == "epsilon":
            return eps(x, t)
        low, high = 0.0, float(angles[-1])
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if time_of(middle, angles) < float(t[0]) else (low, middle)
        noise = eps(x, t)
        return (noise - math.sin(low) * x) / math.cos(low)

    probes = Generator().manual_seed(0) if hutchinson else None
    found, latents, evaluations = ode_log_density(network, x0, PATH, prediction_type, probes, tolerance=1e-6)
    a = ALPHA[-1]
    slope = math.sqrt(
        (a * VARIANCE + 1 - a) / VARIANCE
    )  # of the ODE's map, which carries N(0, 1) at the top to the model
    expected = math.sqrt(a) * MEAN + (x0 - MEAN) * slope
    model = (-0.5 * (expected**2 + math.log(2 * math.pi)) + math.log(slope)).flatten(1).sum(1)
    assert (found - model).abs().max() / 4 * BITS < 1e-4
    assert (latents - expected).abs().max() < 1e-3
    true = -0.5 * ((x0 - MEAN) ** 2 / VARIANCE + math.log(2 * math.pi * VARIANCE)).flatten(1).sum(1)
    assert (model - true).abs().max() / 4 * BITS < 5e-3  # ᾱ_T is not 0
    assert 20 < evaluations < 2000


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "epsilon"])
def test_the_flow_carries_noise_to_the_data_exactly(prediction_type):
    """σ = 1 is noise alone, so that the likelihood of the exact network is the data's, without a gap."""
    x0, top = data(8), None if prediction_type == "flow_prediction" else 999.0
    network = exact_network(FLOW, prediction_type)
    found, latents, _ = ode_log_density(network, x0, FLOW, prediction_type, None, 1e-6, top)
    true = -0.5 * ((x0 - MEAN) ** 2 / VARIANCE + math.log(2 * math.pi * VARIANCE)).flatten(1).sum(1)
    limit = 1e-4 if top is None else 5e-3
    assert (found - true).abs().max() / 4 * BITS < limit
    assert (latents - (x0 - MEAN) / math.sqrt(VARIANCE)).abs().max() < limit


def test_a_path_that_explodes():
    """The latent is x/√(1 + σ²), with the score of the data at σ between the trained levels."""
    path = variance_exploding(60, 0.01, 500.0)

    def score(x, t):
        sigma = path.timestep(float(t[0])) if t[0] >= 1 else path.levels.noise[1] * float(t[0])
        return -(x - MEAN) / (VARIANCE + sigma**2)

    x0 = data(8)
    found, _, _ = ode_log_density(score, x0, path, "score", None, 1e-6)
    true = -0.5 * ((x0 - MEAN) ** 2 / VARIANCE + math.log(2 * math.pi * VARIANCE)).flatten(1).sum(1)
    assert (found - true).abs().max() / 4 * BITS < 5e-3


def test_bits_of_bytes():
    """Of data that are Gaussian but for their bins, the ODE's bits are their entropy, within the standard error."""
    grid = (torch.arange(256, dtype=torch.float64) + 0.5) / 128 - 1
    mass = torch.exp(-((grid - MEAN) ** 2) / (2 * VARIANCE))
    mass = mass / mass.sum()
    entropy = float(-(mass * mass.log2()).sum())
    images = torch.multinomial(mass, 4000 * 4, replacement=True, generator=Generator().manual_seed(0))
    images = images.view(4000, 1, 2, 2).to(torch.uint8)
    found = ode_bits(exact_network(PATH), images, PATH, generator=Generator().manual_seed(1))
    error = float(found.bits.std()) / math.sqrt(4000)
    outside = -math.log2(float(torch.special.ndtr(torch.tensor((1 - MEAN) / math.sqrt(VARIANCE)))))  # mass beyond white
    assert abs(float(found.bits.mean()) - entropy - outside) < 4 * error + 0.01
    with pytest.raises(ValueError, match="uint8"):
        ode_bits(exact_network(PATH), images.float(), PATH, generator=Generator())
    with pytest.raises(ValueError, match="pass a generator"):
        ode_bits(exact_network(PATH), images, PATH)


def test_times_between_the_trained_ones():
    assert [time_of(math.atan(t / (1000 - t)), angles_of(FLOW), True) for t in (1, 2.5, 999)] == pytest.approx(
        [1, 2.5, 999]
    )
    angles = np.arccos(np.sqrt(ALPHA))
    for t in (1, 2, 500, 1000):
        assert abs(time_of(float(angles[t]), angles) - t) < 1e-6
    times = [time_of(theta, angles) for theta in np.linspace(0, angles[-1], 500)]
    assert times[0] == 0
    assert all(earlier < later for earlier, later in itertools.pairwise(times))
