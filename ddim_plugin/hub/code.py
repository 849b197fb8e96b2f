"""Build the code file of a repository, which diffusers runs for `custom_pipeline="ddim_plugin_…"`."""

import ast
import re
import textwrap
from collections import namedtuple
from functools import cache
from pathlib import Path

from ..version import __version__

Code = namedtuple("Code", "name text")  # the name of the code file is without .py
STALE = re.compile(r"(scheduler/)?ddim_plugin_\d+_\d+\w*\.py")  # names of the code files of any version

EXPORTS = """    for place, module in [*globals().items()]:
        for name, each in vars(module).items() if isinstance(module, SimpleNamespace) else ():
            if isinstance(each, type) and each.__module__ == __name__:  # a library may have the name too
                each.__qualname__ = name if globals().setdefault(name, each) is each else f"{place}.{name}"
"""


@cache
def code() -> Code:
    root = Path(__file__).parents[1]
    sources = {".".join(p.relative_to(root).with_suffix("").parts): p.read_text("utf-8") for p in root.rglob("*.py")}
    title = f'"""ddim-plugin {__version__} in one file, a function for each module. License: Apache-2.0."""'
    text = f"{title}\n\nfrom types import SimpleNamespace\n{join('pipelines.generation', sources)}{EXPORTS}"
    return Code("ddim_plugin_" + re.sub(r"\W", "_", __version__), text)


def join(entry: str, sources: dict[str, str]) -> str:
    """Write a module and those that it imports at the top as functions, and their calls, dependencies first.

    Each returns the names of its module, so that two modules may define the same name. `sources` are texts of modules
    by their dotted names. The functions are called once, although diffusers runs the file at each load, so that the
    classes of earlier pipelines stay valid.
    """
    flat, functions = {module: f"ddim_{module.replace('.', '_')}" for module in sources}, {}

    def add(module: str) -> None:
        lines = sources[module].splitlines()
        for node in reversed(ast.parse(sources[module]).body):
            if isinstance(node, ast.ImportFrom) and node.level:
                base, parts = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])]), []
                for each in node.names:
                    inner = f"{base}.{each.name}".removeprefix(".")
                    source = next(name for name in (inner, base, f"{base}.__init__") if name in sources)
                    if flat[source] not in functions:
                        add(source)
                    value = flat[source] if source == inner else f"{flat[source]}.{each.name}"
                    parts.append(f"{each.asname or each.name} = {value}")
                lines[node.lineno - 1 : node.end_lineno] = ["; ".join(parts)]
        body = textwrap.indent("\n".join(lines), "    ")
        functions[flat[module]] = f"\n\ndef _{flat[module]}():\n{body}\n    return SimpleNamespace(**locals())\n"

    add(entry)
    calls = [f"    {name} = _{name}()\n" for name in functions]
    return "".join([*functions.values(), f'\n\nif "{flat[entry]}" not in globals():\n', *calls])
