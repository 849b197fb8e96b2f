"""GeneralizedDDIMPipeline for diffusers. The code is in ddim_plugin_0_1_0_064a6123.py.

diffusers runs this file anew at each load. The code is run once, so that the classes of all pipelines stay the same.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for diffusers: it copies the files that such lines name
    from .ddim_plugin_0_1_0_064a6123 import GeneralizedDDIMPipeline

if "ddim_plugin_0_1_0_064a6123" not in sys.modules:
    spec = importlib.util.spec_from_file_location("ddim_plugin_0_1_0_064a6123", Path(__file__).with_name("ddim_plugin_0_1_0_064a6123.py"))
    module = sys.modules["ddim_plugin_0_1_0_064a6123"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["ddim_plugin_0_1_0_064a6123"]
        raise

sys.modules.setdefault("ddim_plugin_0_1_0_064a6123_scheduler", sys.modules["ddim_plugin_0_1_0_064a6123"])  # where diffusers looks for what it is given instead
GeneralizedDDIMPipeline = sys.modules["ddim_plugin_0_1_0_064a6123"].GeneralizedDDIMPipeline
