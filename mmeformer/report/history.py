# SPDX-License-Identifier: Apache-2.0
"""Read the numbers that the runs of a training logged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from mmengine.config import Config

from mmeformer.work_dirs import SCALARS

NOT_METRICS = ("step", "after", "time", "data_time")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """Values of one number over the training.

    Args:
        name: as in the log.
        steps: iterations, or epochs for metrics that are logged by epoch.
        values: of the same length.
    """

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """What a training logged.

    Args:
        training: rows of training iterations, in their order, with ``iter``.
        validation: rows of validations, with the metrics, ``step`` and ``after``: the last
            iteration in the log before it.
    """

    training: Sequence[Row] = field(default_factory=list)
    validation: Sequence[Row] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        """The last iteration in the log."""
        return max((int(row["iter"]) for row in self.training), default=0)

    def losses(self) -> list[Series]:
        """The loss and its terms."""
        found = _series(self.training, lambda name: "loss" in name, "iter")
        return sorted(found, key=lambda series: (series.name != "loss", series.name))

    def learning_rates(self) -> list[Series]:
        """Learning rates; those that are equal all the time are one."""
        found = _series(self.training, lambda name: name.rpartition("/")[2].endswith("lr"), "iter")
        return list({series.values: series for series in reversed(found)}.values())[::-1]

    def metrics(self, place: str = "after") -> list[Series]:
        """Metrics of the validations. What a metric does not know (-1, NaN) is left out.

        Args:
            place: ``step`` or ``after``, the entry that becomes ``steps``.
        """

        def is_metric(name: str) -> bool:
            return name.rpartition("/")[2] not in NOT_METRICS

        found = _series(self.validation, is_metric, place)
        return [series for series in found if series.values]

    def times(self) -> list[Series]:
        """Seconds of an iteration, in all and to wait for data."""
        return _series(self.training, lambda name: name in ("time", "data_time"), "iter")

    def seconds(self) -> tuple[float, float] | None:
        """Typical seconds of an iteration, in all and to wait for data; None if not logged."""
        rows = [row for row in self.training if "time" in row and "data_time" in row]
        if not rows:
            return None
        # The first iterations compile kernels and start workers.
        rows = rows[1:] or rows
        return median(row["time"] for row in rows), median(row["data_time"] for row in rows)

    def memory(self) -> float | None:
        """Largest memory of the GPU in MiB; None on a CPU."""
        return max((row["memory"] for row in self.training if "memory" in row), default=None)


def read(work_dir: str | Path) -> History:
    """Read the logs of all runs in a work directory.

    A run that resumed continues those before it; a run from the beginning replaces them.
    """
    training: list[Row] = []
    validation: list[Row] = []
    for path in sorted(Path(work_dir).glob(SCALARS)):
        steps: list[Row] = []
        results: list[Row] = []
        rows = list(_rows(path))
        if not rows:
            continue
        resumed = _is_resumed(path.with_name("config.py"))
        first = next((row["iter"] for row in rows if "iter" in row), 0)
        training = _before(training, first, "iter") if resumed else []
        last = training[-1]["iter"] if training else 0
        for row in rows:
            if "iter" in row:
                steps.append(row)
                last = row["iter"]
            else:
                results.append({**row, "after": last})
        begin = results[0]["after"] if results else last
        training = training + steps
        validation = (_before(validation, begin, "after") if resumed else []) + results
    return History(training, validation)


def _rows(path: Path) -> Iterable[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            # The last line of a run that was killed.
            continue
        if isinstance(row, dict):
            yield row


def _is_resumed(path: Path) -> bool:
    return path.is_file() and bool(Config.fromfile(str(path)).get("resume"))


def _before(rows: Sequence[Row], place: float, key: str) -> list[Row]:
    return [row for row in rows if row[key] < place]


def _series(rows: Sequence[Row], wanted: Callable[[str], bool], place: str) -> list[Series]:
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, (int, float)) and wanted(name)
    )
    found = []
    for name in names:
        pairs = [
            (float(row[place]), float(row[name]))
            for row in rows
            if isinstance(row.get(name), (int, float)) and row[name] != -1
        ]
        pairs = [pair for pair in pairs if math.isfinite(pair[1])]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        found.append(Series(name, steps, values))
    return found
