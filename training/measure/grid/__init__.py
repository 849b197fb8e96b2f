"""A grid of steps × variance × spacing × scheduler: its cells, how each is sampled and measured, tables and plots."""
