"""The public names, for editors and type checkers. `__init__.py` imports them when they are used."""

from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from .pipelines.fit import fit_solver as fit_solver
from .pipelines.generation import GeneralizedDDIMPipeline as GeneralizedDDIMPipeline
from .pipelines.invert import Inverted as Inverted
from .pipelines.invert import invert as invert
from .schedulers import DiscreteDDIMScheduler as DiscreteDDIMScheduler
from .schedulers import GeneralizedDDIMScheduler as GeneralizedDDIMScheduler
from .schedulers import GeneralizedDDIMSchedulerOutput as GeneralizedDDIMSchedulerOutput
from .schedulers import InverseDDIMScheduler as InverseDDIMScheduler
from .schedulers import InverseMultistepDDIMScheduler as InverseMultistepDDIMScheduler
from .schedulers import MultistepDDIMScheduler as MultistepDDIMScheduler
from .schedulers import restore_scheduler as restore_scheduler
from .version import __version__ as __version__
