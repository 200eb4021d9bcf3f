"""Old import paths of modules that have moved: they work for one release, with a warning.

After `import msa.model.records`, the old module looks each name up in `msa.training.documents`, so
that the old and the new path give the same objects. To move a module, add a line to MOVED.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, str] = {}
"""Old path to new path. An entry "old.module" moves a whole module. An entry "old.module:name" says
where one name of that module is now, if it has a new name or if it left the other names."""


class Finder(MetaPathFinder, Loader):
    """Finds and loads the old paths. Python asks it after its own finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the modules of MOVED, None for all other modules."""
        return ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, then let the old module look up its names in the new one.

        Raises:
            ModuleNotFoundError: the new module needs a library that is not installed.
        """
        old = module.__name__
        message = f"{old} has moved: import {MOVED[old]}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        importlib.import_module(MOVED[old])

        def look_up(name: str) -> Any:
            new_module, _, new_name = MOVED.get(f"{old}:{name}", MOVED[old]).partition(":")
            return getattr(importlib.import_module(new_module), new_name or name)

        module.__dict__["__getattr__"] = look_up


def install() -> None:
    """Let Python ask the finder. A second call changes nothing."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
