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

HEADER = f'''"""ddim-plugin {__version__} in one file, a function for each module. License: Apache-2.0."""

from types import SimpleNamespace
'''

EXPORTS = """    for place, module in [*globals().items()]:
        for name, each in vars(module).items() if isinstance(module, SimpleNamespace) else ():
            if isinstance(each, type) and each.__module__ == __name__:  # a library may have the name too
                each.__qualname__ = name if globals().setdefault(name, each) is each else f"{place}.{name}"
"""


@cache
def code() -> Code:
    root = Path(__file__).parents[1]
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    modules = join(ENTRY, {name: path.read_text(encoding="utf-8") for name, path in paths.items()}.get)
    return Code("ddim_plugin_" + re.sub(r"\W", "_", __version__), f"{HEADER}{modules}{EXPORTS}")


def join(entry: str, read: Callable[[str], str | None]) -> str:
    """Write a module and those that it imports at the top as functions, and their calls, dependencies first.

    `read` returns the source of a module by its dotted name, or None. The functions are called once, although diffusers
    runs the file at each load, so that the classes of earlier pipelines stay valid.
    """
    functions: dict[str, str] = {}

    def add(module: str) -> None:
        lines = (read(module) or "").splitlines()
        for node in reversed(ast.parse("\n".join(lines)).body):
            if isinstance(node, ast.ImportFrom) and node.level:
                base, parts = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])]), []
                for each in node.names:
                    inner = f"{base}.{each.name}".removeprefix(".")
                    source = next(name for name in (inner, base, f"{base}.__init__") if read(name) is not None)
                    if _flat(source) not in functions:
                        add(source)
                    value = _flat(source) if source == inner else f"{_flat(source)}.{each.name}"
                    parts.append(f"{each.asname or each.name} = {value}")
                lines[node.lineno - 1 : node.end_lineno] = ["; ".join(parts)]
        body = textwrap.indent("\n".join(lines), "    ")
        functions[_flat(module)] = f"\n\ndef _{_flat(module)}():\n{body}\n    return SimpleNamespace(**locals())\n"

    add(entry)
    calls = [f"    {name} = _{name}()\n" for name in functions]
    return "".join([*functions.values(), f'\n\nif "{_flat(entry)}" not in globals():\n', *calls])


def _flat(module: str) -> str:
    return f"ddim_{module.replace('.', '_')}"
