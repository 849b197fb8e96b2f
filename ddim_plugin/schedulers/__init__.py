"""Schedulers for the loop of any pipeline of diffusers."""

from .config import KEY, STOCK_SPACINGS, restore_scheduler, restored
from .discrete import DiscreteDDIMScheduler
from .generalized import DETERMINISTIC, GeneralizedDDIMScheduler
from .inverse import InverseDDIMScheduler, InverseMultistepDDIMScheduler
from .multistep import MultistepDDIMScheduler, keep_learned, sampler_class
from .step import GeneralizedDDIMSchedulerOutput, Randomness, check_generators
