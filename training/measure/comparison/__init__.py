"""Samplers without training, compared at few evaluations of the network."""
