"""Saving, sharing and opening models."""
