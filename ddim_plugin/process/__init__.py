"""Compute levels, timesteps, steps and solvers in float64, with NumPy and torch only."""
