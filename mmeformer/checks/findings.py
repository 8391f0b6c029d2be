# SPDX-License-Identifier: Apache-2.0
"""Problems that the data-set checks of all tasks report, and when they stop a training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from mmengine.logging import print_log

ERROR = "error"
WARNING = "warning"
MAX_LEFT_OUT = 0.01
"""Share of a training set that training may leave out because of errors."""


@dataclass(frozen=True)
class Finding:
    """A problem of a data set: an error or a warning.

    Args:
        severity: ``"error"`` (training would crash or learn wrong things) or ``"warning"``.
        kind: short name of the problem, the same for every file that has it.
        path: the file, or the folder if no single file is the cause.
        message: what is wrong and how to fix it.
    """

    severity: str
    kind: str
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.message}"


def errors_first(findings: Sequence[Finding]) -> list[Finding]:
    """Sort errors before warnings; otherwise the order stays."""
    return sorted(findings, key=lambda finding: finding.severity != ERROR)


def first_of(items: Collection, shown: int = 5) -> str:
    """The first items, each as Python shows it (shortened), and how many follow."""
    text = ", ".join(shorten(item) for item in islice(items, shown))
    more = len(items) - shown
    return f"[{text}, and {more} more]" if more > 0 else f"[{text}]"


def shorten(value: object, length: int = 60) -> str:
    """A value as Python shows it, but for the end of long ones."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 4]}...{text[-1]}"


def format_findings(findings: Sequence[Finding], per_kind: int = 5) -> str:
    """Findings as text, one per line: the first ``per_kind`` of each kind, and how many follow."""
    total = Counter(finding.kind for finding in findings)
    shown: Counter[str] = Counter()
    lines = []
    for finding in findings:
        shown[finding.kind] += 1
        if shown[finding.kind] <= per_kind:
            lines.append(str(finding))
        elif shown[finding.kind] == total[finding.kind]:
            lines.append(f"... and {total[finding.kind] - per_kind} more of: {finding.kind}")
    return "\n".join(lines)


def stop_on_errors(findings: Sequence[Finding], left_out: Mapping[str, int]) -> None:
    """Raise if a data set has errors; log its warnings.

    Args:
        findings: findings of the data set.
        left_out: kinds of errors whose images or boxes training leaves out by itself, with the
            total number of images or boxes. Up to :data:`MAX_LEFT_OUT` of them are only logged.

    Raises:
        ValueError: the data set has errors; the message lists files and fixes.
    """
    counts = Counter(finding.kind for finding in findings)
    few = {kind for kind, total in left_out.items() if counts[kind] <= MAX_LEFT_OUT * total}
    errors = [item for item in findings if item.severity == ERROR and item.kind not in few]
    if errors:
        raise ValueError(f"the data set has errors:\n{format_findings(errors)}")
    if findings:
        print_log(
            f"the data set has problems:\n{format_findings(findings)}", "current", logging.WARNING
        )
