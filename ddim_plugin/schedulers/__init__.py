"""Schedulers for the loop of any pipeline of diffusers."""

from .config import KEY, STOCK_SPACINGS, restore_scheduler, restored
from .generalized import DETERMINISTIC, GeneralizedDDIMScheduler
from .inverse import InverseDDIMScheduler
from .multistep import InverseMultistepDDIMScheduler, MultistepDDIMScheduler, keep_learned, sampler_class
from .step import GeneralizedDDIMSchedulerOutput
from .tensors import Randomness, check_generators

__all__ = [
    "DETERMINISTIC",
    "KEY",
    "STOCK_SPACINGS",
    "GeneralizedDDIMScheduler",
    "GeneralizedDDIMSchedulerOutput",
    "InverseDDIMScheduler",
    "InverseMultistepDDIMScheduler",
    "MultistepDDIMScheduler",
    "Randomness",
    "check_generators",
    "keep_learned",
    "restore_scheduler",
    "restored",
    "sampler_class",
]
