"""Measurements: distances, likelihoods, tables."""
