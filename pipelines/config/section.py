"""The base of a recipe's sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of the sections: frozen; unknown keys, infinities and text for numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
