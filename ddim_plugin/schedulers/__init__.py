"""Schedulers for the loop of any pipeline of diffusers."""
