"""Extensions of other packages: objectives, measures and model families by entry points."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from sgmd_core.errors import ConfigError


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
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise self.refusal(found, expected) from error

    def refusal(self, found: str, expected: str) -> ConfigError:
        """The error of an extension that cannot be used.

        Args:
            found: What it is.
            expected: What it should be.
        """
        point = self.point
        return ConfigError(
            f"loading the {self.kind} {point.name} ({point.value}, entry point of {point.group})",
            found,
            expected,
            "Correct or uninstall the package that provides it",
        )
