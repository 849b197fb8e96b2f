"""Training and measuring networks for categorical data (Song, Meng, Ermon 2021, Appendix A)."""

from .objective import DISCRETE_LOSSES, DiscreteObjective, bound_bits, quantize

__all__ = ["DISCRETE_LOSSES", "DiscreteObjective", "bound_bits", "quantize"]
