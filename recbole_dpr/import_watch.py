"""Changing a module of another package as it is imported, or what it alone sees of a third."""

import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any


class Overlay(ModuleType):
    """A module seen through, save for the names that are given anew.

    Put in the place of `torch` or `pd` inside ONE RecBole module, it changes a function
    for that module and for nobody else.
    """

    def __init__(self, base: ModuleType, **names: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(names, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


Surround = Callable[[ModuleType], Any]  # a context manager around a module's execution


class ImportWatch:
    """A finder that runs context managers around the execution of chosen modules."""

    def __init__(self) -> None:
        self.surrounds: dict[str, list[Surround]] = {}

    def add(self, module: str, surround: Surround) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self.surrounds.setdefault(module, []).append(surround)
        if module in sys.modules:
            with surround(sys.modules[module]):
                pass

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.surrounds:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, self.surrounds[name])
        return spec

    @staticmethod
    def _wrap(loader: Any, surrounds: list[Surround]) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with ExitStack() as stack:
                for surround in surrounds:
                    stack.enter_context(surround(module))
                execute(module)

        loader.exec_module = exec_module


watch = ImportWatch()


def after_import(*modules: str) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Run a function on each of the modules, as soon as it is imported."""

    def register(action: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        @contextmanager
        def surround(module: ModuleType) -> Iterator[None]:
            yield
            action(module)

        for module in modules:
            watch.add(module, surround)
        return action

    return register
