"""Build the code file of a repository, which diffusers runs for `custom_pipeline="ddim_plugin_…"`.

Each module of the package becomes a function that returns its names, so that two modules may define the same name.
"""

import ast
import re
import textwrap
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..version import __version__

ENTRY = "pipelines.generation"  # the file contains this module and all modules of the package that it imports
Code = namedtuple("Code", "name text")  # the name of the code file is without .py
STALE = re.compile(r"(scheduler/)?ddim_plugin_\d+_\d+\w*\.py")  # names of the code files of any version

HEADER = f'''"""ddim-plugin {__version__} in one file: Denoising Diffusion Implicit Models for Hugging Face diffusers.

Each function is a module of the package. License: Apache-2.0.
"""

from types import SimpleNamespace
'''

EXPORTS = """    for place, module in [*globals().items()]:
        for name, each in vars(module).items() if isinstance(module, SimpleNamespace) else ():
            if isinstance(each, type) and each.__module__ == __name__:  # a library may have the name too
                each.__qualname__ = name if globals().setdefault(name, each) is each else f"{place}.{name}"
"""


@cache
def code() -> Code:
    """Build the code file."""
    return Code("ddim_plugin_" + re.sub(r"\W", "_", __version__), f"{HEADER}{join(ENTRY, _read)}{EXPORTS}")


def join(entry: str, read: Callable[[str], str | None]) -> str:
    """Write a module and those it imports as functions, and the calls of these, dependencies first.

    `read` returns the source of a module by its dotted name, or None. Modules import each other at the top. The calls
    are made once, although diffusers runs the file at each load, so that the classes of earlier pipelines stay valid.
    """
    functions: dict[str, str] = {}
    libraries: dict[str, set[str]] = {}  # names that are imported from each, for all functions

    def add(module: str) -> None:
        text = read(module) or ""
        lines = text.splitlines()
        for node in reversed(ast.parse(text).body):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
                names, values = [], []
                for each in node.names:
                    inner = f"{base}.{each.name}".removeprefix(".")
                    source = next(name for name in (inner, base, f"{base}.__init__") if read(name) is not None)
                    if _flat(source) not in functions:
                        add(source)
                    names.append(each.asname or each.name)
                    values.append(_flat(source) if source == inner else f"{_flat(source)}.{each.name}")
                lines[node.lineno - 1 : node.end_lineno] = [f"{', '.join(names)} = {', '.join(values)}"]
            elif isinstance(node, ast.Import | ast.ImportFrom):
                lines[node.lineno - 1 : node.end_lineno] = []
                start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
                libraries.setdefault(start, set()).update(map(ast.unparse, node.names))
        body = textwrap.indent("\n".join(lines), "    ")
        functions[_flat(module)] = f"\n\ndef _{_flat(module)}():\n{body}\n    return SimpleNamespace(**locals())\n"

    add(entry)
    calls = [f"    {name} = _{name}()\n" for name in functions]
    imports = [f"{start} {', '.join(sorted(names))}\n" for start, names in sorted(libraries.items())]
    return "".join([*imports, *functions.values(), f'\n\nif "{_flat(entry)}" not in globals():\n', *calls])


def _read(module: str) -> str | None:
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    return path.read_text(encoding="utf-8") if module and path.is_file() else None


def _flat(module: str) -> str:
    return f"ddim_{module.replace('.', '_')}"
