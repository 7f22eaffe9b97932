"""The ids under which keys can be remapped in `config.toml`: those of every binding of the console."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from textual.binding import Binding
from textual.dom import DOMNode

from tuimig.core.errors import UsageError


def known_bindings() -> dict[str, Binding]:
    """All bindings with an id, by it."""
    import tuimig.app
    import tuimig.screens
    import tuimig.widgets

    for package in (tuimig.screens, tuimig.widgets):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found: dict[str, Binding] = {}
    for kind in _all_subclasses(DOMNode):
        if kind.__module__.startswith("tuimig."):
            for binding in kind.__dict__.get("BINDINGS", []):
                if isinstance(binding, Binding) and binding.id:
                    found[binding.id] = binding
    return found


def _all_subclasses(kind: type[Any]) -> set[type[Any]]:
    return {found for child in kind.__subclasses__() for found in (child, *_all_subclasses(child))}


def refuse_unknown(keys: Mapping[str, str], subject: str) -> None:
    """A misspelt id would be a key that silently does nothing."""
    if not keys:
        return
    known = known_bindings()
    for name in keys:
        if name not in known:
            alike = [other for other in known if other.split(".")[0] == name.split(".")[0]] or list(known)
            cure = f"Known: {', '.join(sorted(alike))}"
            raise UsageError(f"no key is called {name!r}", subject=f"{subject} [keys]", cure=cure)
