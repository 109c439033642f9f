"""Load only those parts of CompressAI and timm that are used.

`import compressai.layers` first runs compressai/__init__.py, which imports all of CompressAI: its
point-cloud half with torch_geometric (and thereby the compiler of torch) and pandas, its data sets
and torchvision. `import timm.layers` loads every model of timm. Together they take three seconds of
CPU time, more than twice as long as torch itself, and almost nothing of it is needed here.

After `install()`, the packages in PACKAGES run the statements `from .module import name` of their
__init__.py when a name is first used. Everything can be imported as before, and what is never used
needs not be installed. Python 3.15 has this as a statement, `lazy from .module import name`
(PEP 810), but no released version of the two libraries uses it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import LazyLoader, resolve_name
from types import ModuleType

PACKAGES = ("compressai", "compressai.registry", "timm", "timm.layers", "timm.optim")
# CompressAI imports scipy.stats for one quantile; its 0.5 s are spent when this is computed.
MODULES = ("scipy.stats",)


class _LazyPackage(ModuleType):
    """A package that looks names up in its modules when they are first used."""

    def __init__(self, name: str):
        super().__init__(name)
        self._sources: dict[str, tuple[str, str]] = {}  # name here -> module, name there

    def __getattr__(self, name: str) -> object:
        if name == "__all__":  # for `from package import *`, if __init__.py does not say
            return [word for word in dir(self) if not word.startswith("_")]
        if name not in self._sources:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        module, original = self._sources[name]
        if module == self.__name__:  # from package import module
            value: object = importlib.import_module(f"{module}.{original}")
        else:
            value = getattr(importlib.import_module(module), original)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # After it has imported timm.layers.create_attn, Python binds the module to this name. But
        # timm.layers.create_attn is the function that __init__.py imports from the module.
        if not (isinstance(value, ModuleType) and name in vars(self).get("_sources", ())):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._sources})


class _Loader(SourceFileLoader):
    """Runs the __init__.py of a package except for imports of single names from its modules."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LazyPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        tree = ast.parse(self.get_data(self.path), self.path)
        statements = []
        for statement in tree.body:
            names = self._lazy_names(statement, module.__name__)
            if names is None:
                statements.append(statement)
            else:
                module._sources.update(names)
        tree.body = statements
        exec(compile(tree, self.path, "exec"), vars(module))

    @staticmethod
    def _lazy_names(statement: ast.stmt, package: str) -> dict[str, tuple[str, str]] | None:
        """Sources of the names that `statement` imports; None if it has to be executed."""
        if not isinstance(statement, ast.ImportFrom) or statement.names[0].name == "*":
            return None
        module = resolve_name("." * statement.level + (statement.module or ""), package)
        if module.partition(".")[0] != package.partition(".")[0]:
            return None
        return {alias.asname or alias.name: (module, alias.name) for alias in statement.names}


class _Finder(MetaPathFinder):
    """Finds the packages and modules above; before others are loaded, it calls `prepare`."""

    def __init__(self, prepare: dict[str, Callable[[], object]]):
        self.prepare = prepare

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        if name in self.prepare:
            self.prepare[name]()
        if name not in PACKAGES + MODULES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        if name in PACKAGES:
            spec.loader = _Loader(name, spec.loader.path)
        else:
            spec.loader = LazyLoader(spec.loader)
        return spec


def install(prepare: dict[str, Callable[[], object]]) -> None:
    """Make later imports of PACKAGES and MODULES lazy.

    prepare: functions to call before the module of this name is imported.
    """
    sys.meta_path.insert(0, _Finder(prepare))
