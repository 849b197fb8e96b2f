"""Classifiers of pictures: of clean ones, whose features are compared, and of noisy ones, which guide a model."""
