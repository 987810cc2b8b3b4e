"""What a page may ask, and nothing else: every field by name and within bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=200_000)]


class Asked(BaseModel):
    """A prompt, and where the prediction is read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text
    position: int = -1


class AskedEdit(BaseModel):
    """One edit, as ``causal.Edit`` has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    heads: Annotated[str, Field(max_length=200)]
    scale: float | None = None
    source: Text | None = None
    position: int | None = None


class AskedEdits(Asked):
    """A prompt with heads edited."""

    edits: Annotated[list[AskedEdit], Field(max_length=64)]
