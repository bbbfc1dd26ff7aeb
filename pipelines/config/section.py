"""The base of a recipe's sections."""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of the sections: frozen; unknown keys, infinities and text for numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def contradictions(self) -> Iterable[str]:
        """Sentences on settings that do not fit together; a section says its own."""
        return ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = list(self.contradictions())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def kinds(cls) -> "Iterator[type[Section]]":
        """All sections that are imported."""
        for kind in cls.__subclasses__():
            yield kind
            yield from kind.kinds()

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """Docstrings of the settings by name, those of the bases first.

        They are read from the source when they are asked for: reading them for every process that
        imports a recipe takes a sixth of a second.
        """
        found: dict[str, str] = {}
        for kind in reversed(cls.__mro__):
            if issubclass(kind, Section):
                found |= _docstrings(kind)
        return found


def _docstrings(kind: type) -> dict[str, str]:
    """Strings that follow the attributes of a class, as its source has them."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    return {
        setting.target.id: inspect.cleandoc(text.value.value)
        for setting, text in pairwise(body.body)
        if isinstance(setting, ast.AnnAssign)
        and isinstance(setting.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
