# SPDX-License-Identifier: Apache-2.0
"""What the checks of all tasks report, and when it keeps a training from beginning."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmengine.logging import print_log

ERROR = "error"
WARNING = "warning"
MAX_LEFT_OUT = 0.01
"""Share of a training set that may be left out of the training for its mistakes."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a data set.

    Args:
        severity: ``"error"`` (training would crash or learn nonsense) or ``"warning"``.
        kind: short name of the mistake, the same for every file that has it.
        path: the file, or the folder where no single file is to blame.
        message: what is wrong and how to mend it.
    """

    severity: str
    kind: str
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.message}"


def errors_first(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, in their order, errors before warnings."""
    return sorted(findings, key=lambda finding: finding.severity != ERROR)


def describe(findings: Sequence[Finding], per_kind: int = 5) -> str:
    """Findings as text, one a line; of each kind the first ``per_kind`` and how many more."""
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
    """Raise if a data set has errors; log what else was found.

    Args:
        findings: of the data set.
        left_out: kinds that training leaves out by itself, and how many things (images, boxes)
            there are. At most :data:`MAX_LEFT_OUT` of them are no reason to stop.

    Raises:
        ValueError: with the errors, files and mends.
    """
    counts = Counter(finding.kind for finding in findings)
    few = {kind for kind, total in left_out.items() if counts[kind] <= MAX_LEFT_OUT * total}
    errors = [item for item in findings if item.severity == ERROR and item.kind not in few]
    if errors:
        raise ValueError(f"the data set has errors:\n{describe(errors)}")
    if findings:
        print_log(f"the data set has flaws:\n{describe(findings)}", "current", logging.WARNING)
