"""Kinds of judges, engines, recipes and export formats by name: our own in explicit dictionaries,
others' by entry points.

Another package adds a kind with an entry point, such as
`[project.entry-points."prefab.judges"] mykind = "mypackage.judge:JUDGE"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class Registry(Mapping[str, Any]):
    """A mapping from a kind's name to its object, imported when it is first looked up.

    A built-in name cannot be replaced by an entry point.
    """

    def __init__(self, group: str, builtin: Mapping[str, str]) -> None:
        self.group, self.builtin = group, builtin

    @cached_property
    def others(self) -> dict[str, EntryPoint]:
        """Entry points of installed packages, by name."""
        return {
            entry.name: entry
            for entry in entry_points(group=self.group)
            if entry.name not in self.builtin
        }

    def __getitem__(self, name: str) -> Any:
        if name not in self.builtin:
            return self.others[name].load()
        module, _, attribute = self.builtin[name].partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found

    def __iter__(self) -> Iterator[str]:
        return iter([*self.builtin, *self.others])

    def __len__(self) -> int:
        return len(self.builtin) + len(self.others)
