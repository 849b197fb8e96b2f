"""The one code file of a repo, for readers who have diffusers and not this package.

diffusers runs such a file for `custom_pipeline=` and `trust_remote_code=True`. One file without relative imports is
what it finds and copies most reliably, whatever the id of the repo.
"""

import ast
import builtins
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..version import __version__

ROOT = Path(__file__).parents[1]
ENTRY = "pipelines.generation"
"""The module of the pipeline: the file holds it and all that it imports."""

HEADER = f'''"""ddim-plugin {__version__} in one file: Denoising Diffusion Implicit Models for Hugging Face diffusers.

Joined from the modules of the package, for sampling and latents. Docstrings are cut to their first paragraph.
License: Apache-2.0.
"""
'''

KEPT = """
# diffusers runs this file again at each load. The classes of the first load are put back at the end.
_first = {name: value for name, value in globals().items() if not name.startswith("__")}
"""

FOOTER = "globals().update(_first)\n"

STALE = re.compile(r"(scheduler/)?ddim_plugin_\d+_\d+\w*\.py")
"""Names of the code files of any version."""


class Code(NamedTuple):
    """The name of the code file, without .py, and its text."""

    name: str
    text: str


@cache
def code() -> Code:
    """Return the code file."""
    return Code("ddim_plugin_" + re.sub(r"\W", "_", __version__), join(sources(ENTRY)))


def sources(entry: str) -> dict[str, str]:
    """Return the sources of a module and of those it imports, by dotted name, dependencies first."""

    def path(name: str) -> Path:
        return ROOT.joinpath(*name.split(".")).with_suffix(".py")

    found: dict[str, str] = {}

    def visit(name: str) -> None:
        text = path(name).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            for each in _siblings(name, node, lambda other: path(other).is_file()):
                if each.module not in found:
                    visit(each.module)
        found[name] = text

    visit(entry)
    return found


def join(modules: dict[str, str]) -> str:
    """Join the sources of modules, each after those it imports.

    Absolute imports move to the top. A name that has another meaning in a module before is renamed. A module that is
    imported becomes a namespace with its names.

    Raises:
        ValueError: if a name to rename is also a local one; for relative imports that are not at the top of a module.
    """
    meanings = dict.fromkeys(dir(builtins), "a builtin")  # of the names in the file
    called: dict[str, dict[str, str]] = {}  # for each module: its names, and what they are called in the file
    trees = {module: ast.parse(text) for module, text in modules.items()}
    attributes = {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports, bodies = {"from types import": {"SimpleNamespace"}}, []

    def claim(module: str, name: str, meaning: str) -> str:
        """Choose what a name is called in the file. Return that, or "" if the file has it already."""
        free = meanings.get(name, meaning) == meaning
        made = called[module][name] = name if free else f"{module.replace('.', '_')}_{name}"
        return "" if meanings.get(made) == meaning else meanings.setdefault(made, meaning) and made

    for module, tree in trees.items():
        made, called[module] = [], {}
        for node in tree.body:
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0):
                start = "import" if isinstance(node, ast.Import) else f"from {node.module} import"
                for each in node.names:
                    if name := claim(module, each.asname or each.name, f"{start} {each.name}"):
                        imports.setdefault(start, set()).add(
                            each.name if name == each.name else f"{each.name} as {name}"
                        )
            for each in _siblings(module, node, modules.__contains__):
                if each.is_module:
                    if name := claim(module, each.alias, f"module {each.module}"):
                        inside = [f"{key}={new}" for key, new in called[each.module].items() if key in attributes]
                        lines = textwrap.wrap(", ".join(inside), 116)
                        made.append("\n    ".join([f"{name} = SimpleNamespace(", *lines]) + "\n)")
                elif each.name not in called[each.module]:
                    raise ValueError(f"{module} imports {each.name}, which {each.module} does not define")
                elif each.alias == each.name:
                    called[module][each.name] = called[each.module][each.name]
                elif name := claim(module, each.alias, f"{each.name} of {each.module}"):
                    made.append(f"{name} = {called[each.module][each.name]}")
        defined = {name: node for node in tree.body for name in _bound(node)}
        for name, node in defined.items():
            used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} - {name}
            alike = isinstance(node, ast.Assign) and not used & defined.keys()  # means the same in every module
            claim(module, name, ast.unparse(node) if alike else f"{name} of {module}")
        body = _body(tree, modules[module], {name: new for name, new in called[module].items() if name != new}, module)
        bodies.append("\n\n".join(filter(None, [f"# ======== {module} ========", *made, body])))
    lines = [f"import {name}" for name in sorted(imports.pop("import", ()))]
    lines += [f"{start} {', '.join(sorted(found))}" for start, found in sorted(imports.items())]
    return "\n\n\n".join(["\n".join([HEADER, *lines, KEPT.rstrip()]), *bodies, FOOTER])


class _Sibling(NamedTuple):
    """What a module takes from another: a name of it, or the module itself; under an alias."""

    module: str
    name: str
    alias: str
    is_module: bool


def _siblings(module: str, node: ast.stmt, exists: Callable[[str], bool]) -> Iterator[_Sibling]:
    """Yield what a relative import takes from other modules; nothing for other statements."""
    if not isinstance(node, ast.ImportFrom) or node.level == 0:
        return
    base = ".".join([*module.split(".")[: -node.level], *(node.module.split(".") if node.module else ())])
    for each in node.names:
        found = [f"{base}.{each.name}".removeprefix("."), base, f"{base}.__init__"]
        name = next((name for name in found if name and name != ".__init__" and exists(name)), None)
        if name is None:
            raise ValueError(f"{module} imports {each.name}, which is not for the code file")
        yield _Sibling(name, each.name, each.asname or each.name, name == found[0])


def _bound(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    inner = [each.target for each in ast.walk(node) if isinstance(each, ast.comprehension)]
    skipped = {each for target in inner for each in ast.walk(target)}
    found = [each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
    return list(dict.fromkeys(each.id for each in found if each not in skipped and each.id != "__all__"))


def _body(tree: ast.Module, text: str, renamed: dict[str, str], module: str) -> str:
    """Return a module without imports of its own, names changed, and docstrings cut to their first paragraph."""
    lines: list[bytes | None] = list(text.encode().splitlines())  # ast counts bytes
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef)]
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {name for scope in scopes for node in ast.iter_child_nodes(scope) for name in _bound(node)}
    if local & renamed.keys():
        raise ValueError(f"{module} has local names {local & renamed.keys()} that other modules define: rename them")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in renamed]
    places = [(node.lineno, node.col_offset, node.id) for node in names]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in renamed:
            places.append((node.lineno, len("def " if isinstance(node, ast.FunctionDef) else "class "), node.name))
            last, new = (node.end_lineno or 0) - 1, renamed[node.name]
            lines[last] = (lines[last] or b"") + f'\n\n\n{new}.__name__ = {new}.__qualname__ = "{node.name}"'.encode()
    for line, column, name in sorted(places, reverse=True):
        whole = lines[line - 1] or b""
        lines[line - 1] = whole[:column] + renamed[name].encode() + whole[column + len(name.encode()) :]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in tree.body:
            raise ValueError(f"{module} has a relative import within a block: move it to the top")
        if isinstance(node, ast.Import | ast.ImportFrom) and node in tree.body:
            lines[node.lineno - 1 : node.end_lineno] = [None] * ((node.end_lineno or node.lineno) - node.lineno + 1)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            start, end = node.body[0].lineno - 1, node.body[0].end_lineno or 0
            blank = next((i for i in range(start, end) if not lines[i]), None)
            if blank is not None:
                lines[blank - 1 : end] = [(lines[blank - 1] or b"") + b'"""', *[None] * (end - blank)]
    text = b"\n".join(line for line in lines if line is not None).decode().strip()
    return re.sub(r"\n{4,}", "\n\n\n", text)
