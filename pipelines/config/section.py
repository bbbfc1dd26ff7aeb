"""The base of a recipe's sections."""

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of the sections: frozen; unknown keys, infinities and text for numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def contradictions(self) -> Iterable[str]:
        """Sentences on settings that do not fit together; a section says its own."""
        return ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(self.contradictions())
        if problems:
            raise ValueError("\n".join(problems))
        return self
