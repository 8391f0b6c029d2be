# SPDX-License-Identifier: Apache-2.0
"""The measurements of a GPU run without one, at small sizes."""

import json
import sys
from pathlib import Path

import pytest
from helpers import load_script

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_script(BENCHMARKS / "gpu.py")


def run(benchmark, tmp_path, monkeypatch, capsys, *parts):
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), "--parts", *parts])
    benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    table = capsys.readouterr().out
    assert all(f"| {row['work']} | {row['way']} |" in table for row in rows)
    baselines = [row for row in rows if row["ratio"] is None]
    assert baselines and all(row["ms"] > 0 for row in rows)
    for row in rows:
        if row["ratio"] is not None:
            mine = [
                b["ms"] for b in baselines if (b["part"], b["work"]) == (row["part"], row["work"])
            ]
            assert row["ratio"] == pytest.approx(row["ms"] / min(mine))
    return rows


def test_backbones(benchmark, tmp_path, monkeypatch, capsys):
    rows = run(benchmark, tmp_path, monkeypatch, capsys, "inference")
    assert {row["way"] for row in rows} >= {"reference's way", "as it comes", "folded"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "throughput", "detectors", "settings", "loop"])
def test_other_parts(benchmark, tmp_path, monkeypatch, capsys, part):
    tasks = ("--tasks", "segmentation", "rotated")
    rows = run(benchmark, tmp_path, monkeypatch, capsys, part, *tasks)
    if part == "detectors":
        assert {row["work"] for row in rows} == {"segmentation", "rotated"}
    assert any(row["ratio"] is not None for row in rows)
