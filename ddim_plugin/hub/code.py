"""The package as one Python file, for a repo whose readers have diffusers and not this package.

diffusers runs code that it finds in a repo (`trust_remote_code=True`), file by file. One file that imports no sibling
is what it copies and finds most surely. Names change with the content, so that files of several versions can stand in
one process and one cache.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..version import __version__

MODULES = ("version", "betas", "tau", "process", "prediction", "ode", "gaussian", "inversion", "images")
MODULES += ("schedulers", "card", "hub", "push", "pipeline")
"""What goes into the file, each after those it imports."""

HEADER = f'''"""ddim-plugin {__version__} in one file: Denoising Diffusion Implicit Models for Hugging Face diffusers.

Written by the package itself, from its modules in their order. License: Apache-2.0.
"""
'''

ITSELF = '''
# ======== bundle ========


def code() -> tuple[str, str]:
    """(name, text) of this file."""
    return Path(__file__).stem, Path(__file__).read_text(encoding="utf-8")
'''


class Code(NamedTuple):
    """The name of the module, without .py, and its text."""

    name: str
    text: str


@cache
def code() -> Code:
    """The package as one file. Raises ValueError where two modules claim one name."""
    text = join({name: Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in MODULES})
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Code(f"ddim_plugin_{__version__.replace('.', '_')}_{digest}", text)


def join(sources: dict[str, str]) -> str:
    """One source from those of modules, each after those it imports.

    Imports from outside go to the top; `from .a import x` goes, as x is there; `from . import a as b` becomes a
    namespace b with what a defines. Raises ValueError where a name in use would come to mean something else.
    """
    modules = [_Module(name, source) for name, source in sources.items()]
    _check_names(modules)
    imports = sorted({line for module in modules for line in module.imported.values()})
    parts = [HEADER, "\n".join([*imports, "from types import SimpleNamespace"]) + "\n", ITSELF]
    for module in modules:
        parts.append(f"\n# ======== {module.name} ========\n\n{module.body}\n")
        aliases = sorted({alias for other in modules for name, alias in other.siblings if name == module.name})
        attributes = "".join(f"    {name}={name},\n" for name in module.defined)
        parts += [f"\n{alias} = SimpleNamespace(\n{attributes})\n" for alias in aliases]
    return "\n".join(parts)


class _Module:
    """A module's source, taken apart."""

    def __init__(self, name: str, source: str):
        tree = ast.parse(source)
        self.name = name
        self.defined: dict[str, str] = {}  # names and the statements that define them
        self.imported: dict[str, str] = {}  # names and the imports from outside that bring them
        self.siblings: list[tuple[str, str]] = []  # of `from . import name as alias`
        self.taken: set[str] = set()  # by `from .module import name`
        lines = source.splitlines()
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(node)
                for i in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[i] = ""
            else:
                self.defined |= dict.fromkeys(_bound(node), ast.unparse(node))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        self.late = {each.id for function in functions for each in ast.walk(function) if isinstance(each, ast.Name)}
        self.body = "\n".join(lines).strip()

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            self.imported |= {each.asname or each.name: f"import {ast.unparse(each)}" for each in node.names}
        elif node.level == 0:
            module = f"from {node.module} import"
            self.imported |= {each.asname or each.name: f"{module} {ast.unparse(each)}" for each in node.names}
        elif node.module is None:
            self.siblings += [(each.name, each.asname or each.name) for each in node.names]
        elif any(each.asname for each in node.names):
            raise ValueError(f"{self.name} renames what it takes from {node.module}: in one file it cannot")
        elif node.module != "bundle":
            self.taken |= {each.name for each in node.names}


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [each.id for target in targets if target for each in ast.walk(target) if isinstance(each, ast.Name)]


def _check_names(modules: list[_Module]) -> None:
    """Raise ValueError where a name that is looked up later, or taken by another module, has two meanings."""
    meanings: dict[str, dict[str, str]] = {}  # name → its definition → the module that has it
    for module in modules:
        for name, definition in (module.defined | module.imported).items():
            meanings.setdefault(name, {})[definition] = module.name
        for name, alias in module.siblings:
            meanings.setdefault(alias, {})[f"module {name}"] = module.name
    for name, definitions in meanings.items():
        users = [module.name for module in modules if name in module.taken]
        users += [
            module.name for module in modules if name in module.late & (module.defined.keys() | module.imported.keys())
        ]
        if len(definitions) > 1 and users:
            raise ValueError(f"{' and '.join(definitions.values())} both define {name}, which {users[0]} uses")
