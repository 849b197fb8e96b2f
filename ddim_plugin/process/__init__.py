"""The process in float64: levels, timesteps, steps, solvers. Needs NumPy and torch alone."""
