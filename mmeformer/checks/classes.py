# SPDX-License-Identifier: Apache-2.0
"""Check the class names and palettes that configs give as ``metainfo``."""

from __future__ import annotations

from collections.abc import Sequence

from mmeformer.checks.findings import first_of


def class_names(names: str | Sequence[str] | None, key: str = "classes") -> tuple[str, ...]:
    """Class names as a tuple.

    Args:
        names: as in the config; None means none.
        key: entry of ``metainfo``, for messages.

    Raises:
        ValueError: ``names`` is a single text instead of a sequence.
    """
    if isinstance(names, str):
        raise ValueError(
            f"metainfo {key} is the text {names!r}; a single class needs a comma: "
            f"{key} = ({names!r},)"
        )
    return tuple(names or ())


def require_classes(classes: Sequence[str]) -> None:
    """Raise ValueError if there are no class names."""
    if not classes:
        raise ValueError("the data set has no class names; set metainfo=dict(classes=(...))")


def require_color_per_class(palette: Sequence, classes: Sequence[str]) -> None:
    """Raise ValueError unless the palette has one color for each class."""
    if len(palette) != len(classes):
        raise ValueError(
            f"metainfo palette has {len(palette)} colors for {len(classes)} classes "
            f"{first_of(list(classes), 20)}; give one (red, green, blue) for each class, or no "
            "palette"
        )
