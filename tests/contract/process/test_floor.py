"""The ground floor: `process` stands on NumPy and torch alone."""

import subprocess
import sys


def test_the_ground_floor_needs_no_diffusers():
    """Each module is loaded where importing diffusers fails."""
    code = """
import importlib, pkgutil, sys, types
sys.modules["diffusers"] = None
from importlib.machinery import PathFinder
spec = PathFinder.find_spec("ddim_plugin")
package = types.ModuleType("ddim_plugin")
package.__path__ = spec.submodule_search_locations if spec else [sys.argv[1]]
sys.modules["ddim_plugin"] = package
process = importlib.import_module("ddim_plugin.process")
names = [module.name for module in pkgutil.iter_modules(process.__path__)]
assert {"betas", "gaussian", "moves", "paths", "spacings"} <= set(names), names
for name in names:
    importlib.import_module("ddim_plugin.process." + name)
"""
    import ddim_plugin

    subprocess.run([sys.executable, "-c", code, ddim_plugin.__path__[0]], check=True)
