"""Who has what, where only one may: of several that claim a value the first by name has it.

Kept up claimant by claimant, so that a change costs what it concerns and not everything there is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Claims(Generic[T]):
    """See the chapter."""

    def __init__(self) -> None:
        self._values_by_name: dict[str, tuple[T, ...]] = {}
        self._names_by_value: dict[T, set[str]] = {}
        self._owner_by_value: dict[T, str] = {}
        self._before: dict[T, str | None] = {}

    @property
    def owner_by_value(self) -> Mapping[T, str]:
        """Who has each value now."""
        return self._owner_by_value

    def set(self, name: str, values: tuple[T, ...]) -> None:
        """What `name` claims from now on; nothing for an empty tuple."""
        before = self._values_by_name.get(name, ())
        if before == values:
            return
        if values:
            self._values_by_name[name] = values
        else:
            self._values_by_name.pop(name, None)
        for value in before:
            if value not in values:
                self._names_by_value[value].discard(name)
                self._settle(value)
        for value in values:
            self._names_by_value.setdefault(value, set()).add(name)
            self._settle(value)

    def take_changes(self) -> dict[T, tuple[str | None, str | None]]:
        """Values whose owner is another than when this was asked last: the old and the new one."""
        before, self._before = self._before, {}
        changes = {
            value: (owner, self._owner_by_value.get(value)) for value, owner in before.items()
        }
        return {value: change for value, change in changes.items() if change[0] != change[1]}

    def _settle(self, value: T) -> None:
        self._before.setdefault(value, self._owner_by_value.get(value))
        names = self._names_by_value[value]
        if names:
            self._owner_by_value[value] = min(names)
        else:
            del self._names_by_value[value]
            self._owner_by_value.pop(value, None)
