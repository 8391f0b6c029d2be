# SPDX-License-Identifier: Apache-2.0
"""Report of a loaded or converted checkpoint: what happened to every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

NEW_NORMS = "pyramid norms, which ImageNet checkpoints do not have: they keep their initial values"
NEW_COUNTERS = "counters of batch norms, which the file leaves out: they keep their values"
SHOWN = 8
"""How many names a line lists."""


def shorten(items: Sequence[str], shown: int = SHOWN) -> str:
    """Join the first few items, and say how many more there are."""
    more = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {more} more" if more > 0 else "")


@dataclass
class Report:
    """Accounts for every tensor of a checkpoint: each is in exactly one of these lists.

    Args:
        title: what was done, such as ``"loaded into efficientformerv2_s0"``.
        source: the file or URL.
        format: title of the format found.
        variant: name of the published variant found, or None.
        loaded: our names of the backbone's tensors that were loaded or converted.
        head: the same of a classifier's head; empty if only a backbone is wanted.
        dropped: rule -> names in the file of tensors that are left out.
        new: reason -> our names of tensors that the file does not hold.
        resized: (our name, grid of the file, grid of the model) of every bias table resized.
        cast: data types in the file that were cast to float32.
        unused: reason -> names and shapes of tensors that do not fit; only with ``allow_partial``.
        notes: further facts.
        warnings: facts that probably need attention.
    """

    title: str
    source: str
    format: str = ""
    variant: str | None = None
    loaded: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    new: dict[str, list[str]] = field(default_factory=dict)
    resized: list[tuple[str, tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    cast: set[str] = field(default_factory=set)
    unused: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def drop(self, rule: str, names: Iterable[str]) -> None:
        """Record that ``names`` were dropped by ``rule``."""
        if names := list(names):
            self.dropped.setdefault(rule, []).extend(names)

    def rows(self) -> list[tuple[str, int | None, str]]:
        """Return (heading, number of tensors or None, details) of every line."""
        rows: list[tuple[str, int | None, str]] = [
            ("source", None, self.source),
            ("format", None, self.format),
        ]
        if self.variant:
            rows.append(("variant", None, self.variant))
        rows.append(("loaded", len(self.loaded), "tensors of the backbone"))
        if self.head:
            rows.append(("loaded", len(self.head), f"of the head: {shorten(self.head)}"))
        for rule, names in self.dropped.items():
            rows.append(("dropped", len(names), f"{rule}: {shorten(names)}"))
        for reason, names in self.new.items():
            rows.append(("new", len(names), f"{reason}: {shorten(names)}"))
        for change in dict.fromkeys((old, new) for _, old, new in self.resized):
            names = [name for name, old, new in self.resized if (old, new) == change]
            grids = " -> ".join(f"{height} x {width}" for height, width in change)
            rows.append(("resized", len(names), f"bias tables {grids}: {shorten(names, 2)}"))
        if self.cast:
            rows.append(("cast", None, f"to float32 from {', '.join(sorted(self.cast))}"))
        for reason, names in self.unused.items():
            rows.append(("PROBLEM", len(names), f"{reason}: {shorten(names)}"))
        rows += [("note", None, note) for note in self.notes]
        rows += [("WARNING", None, warning) for warning in self.warnings]
        return rows

    @property
    def needs_attention(self) -> bool:
        """Whether there are warnings, or tensors that do not fit."""
        return bool(self.unused or self.warnings)

    def __str__(self) -> str:
        lines = [f"Checkpoint {self.title}"]
        for heading, count, details in self.rows():
            number = "" if count is None else f"{count} "
            lines.append(f"  {heading:<10} {number}{details}")
        return "\n".join(lines)
