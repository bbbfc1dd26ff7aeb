"""Extensions of other packages: objectives, measures and model families by entry points.

One that cannot be used is left out with a warning: what does not name it works without it, and what
names it fails with the cause.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from sgmd_core.errors import ConfigError

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Extension:
    """An entry point of another package, and the errors of its loading.

    Attributes:
        kind: What it extends: `method`, `measure` or `family`.
        point: The entry point.
    """

    kind: str
    point: EntryPoint

    def load(self, expected: str) -> Any:  # noqa: ANN401  (whatever the package names)
        """The object that the entry point names.

        Args:
            expected: What it should be, for the error.

        Raises:
            ConfigError: It cannot be imported.
        """
        try:
            return self.point.load()
        # A module that asks for something else may exit.
        except (Exception, SystemExit) as error:
            found = f"{type(error).__name__}: {error}"
            raise self.refusal(found, expected) from error

    def refusal(self, found: str, expected: str) -> ConfigError:
        """The error of an extension that cannot be used.

        Args:
            found: What it is.
            expected: What it should be.
        """
        point = self.point
        # A point that belongs to no installed package has none.
        package = f" {point.dist.name} {point.dist.version}" if point.dist else ""
        return ConfigError(
            f"loading the {self.kind} {point.name} ({point.value}, entry point of {point.group})",
            found,
            expected,
            f"Correct or uninstall the package{package or ' that provides it'}",
        )


@dataclass(frozen=True, slots=True)
class Extensions(Generic[T]):
    """The entry points of one group.

    Attributes:
        usable: What was loaded, by entry point.
        faulty: Errors of those that are left out, by the name of the entry point.
    """

    usable: dict[EntryPoint, T]
    faulty: dict[str, ConfigError]

    def words(self) -> str:
        """Clause for an error on an unknown name, on those that are left out; empty without any."""
        causes = [f"{name} ({error.found})" for name, error in self.faulty.items()]
        return f"; left out, as it cannot be used: {', '.join(causes)}" if causes else ""


def load_extensions(
    group: str, kind: str, load: Callable[[EntryPoint, Sequence[T]], T], own: Sequence[T]
) -> Extensions[T]:
    """Loads the extensions of a group; leaves out those that cannot be used, with a warning each.

    Args:
        group: The group of entry points, for example "sgmd.families".
        kind: What they are, for the warning, for example "a model family".
        load: Loads one, given those before it; raises ConfigError where it cannot be used.
        own: Those that are here without any package.
    """
    usable: dict[EntryPoint, T] = {}
    faulty: dict[str, ConfigError] = {}
    for point in sorted(entry_points(group=group)):
        try:
            usable[point] = load(point, (*own, *usable.values()))
        except ConfigError as error:
            faulty[point.name] = error
            _log.warning("%s is left out: %s", kind, error)
    return Extensions(usable, faulty)
