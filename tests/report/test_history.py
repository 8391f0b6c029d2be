# SPDX-License-Identifier: Apache-2.0
"""The numbers of all runs of a training are read as those of one."""

import json

import pytest

from mmeformer.report.history import History, read


def write_run(work_dir, start, rows, resume=False):
    folder = work_dir / start / "vis_data"
    folder.mkdir(parents=True)
    (folder / "config.py").write_text(f"resume = {resume}\n")
    (folder / "scalars.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def step(iteration, **numbers):
    return dict(iter=iteration, step=iteration, lr=0.1, **numbers)


FIRST = [step(n, loss=float(10 - n), time=0.5, data_time=0.1) for n in range(1, 5)]
RESULTS = [{"coco/bbox_mAP": 0.1, "coco/bbox_mAP_s": -1, "step": 1, "time": 1.0}]
FIRST[2:2] = RESULTS


def test_a_resumed_run_continues(tmp_path):
    write_run(tmp_path, "20260101_100000", [*FIRST, dict(RESULTS[0], step=2)])
    # Of the first run, the iterations after the checkpoint and their validation do not count.
    resumed = [step(3, loss=6.5), {"coco/bbox_mAP": 0.3, "step": 2}, step(4, loss=5.0)]
    write_run(tmp_path, "20260101_110000", resumed, resume=True)
    found = read(tmp_path)
    (loss,) = found.losses()
    assert loss.steps == (1, 2, 3, 4) and loss.values == (9, 8, 6.5, 5)
    # What is not known (-1) is left out, with times and steps.
    (metric,) = found.metrics()
    assert metric.name == "coco/bbox_mAP" and metric.values == (0.1, 0.3)
    # In a training by iterations, the step of what is logged by epoch is always 0.
    assert metric.steps == (2, 3) and found.metrics("step")[0].steps == (1, 2)
    assert found.iterations == 4


def test_a_run_from_the_beginning_replaces(tmp_path):
    write_run(tmp_path, "20260101_100000", [*FIRST, dict(RESULTS[0], step=2)])
    write_run(tmp_path, "20260101_110000", [step(2, loss=1.0)])
    found = read(tmp_path)
    assert found.losses()[0].values == (1,) and found.metrics() == []


def test_equal_learning_rates_are_one(tmp_path):
    rows = [dict(step(n), base_lr=0.1, **{"head/lr": 0.2 * n}) for n in (1, 2)]
    write_run(tmp_path, "20260101_100000", rows)
    assert [item.name for item in read(tmp_path).learning_rates()] == ["lr", "head/lr"]


def test_times_without_the_first_iteration(tmp_path):
    rows = [step(1, time=9.0, data_time=8.0), step(2, time=0.5, data_time=0.1, memory=2048)]
    write_run(tmp_path, "20260101_100000", rows)
    assert read(tmp_path).seconds() == pytest.approx((0.5, 0.1))
    assert read(tmp_path).memory() == 2048


def test_logs_of_killed_and_empty_runs(tmp_path):
    assert read(tmp_path) == History()
    write_run(tmp_path, "20260101_100000", FIRST)
    path = tmp_path / "20260101_100000" / "vis_data" / "scalars.json"
    path.write_text(path.read_text() + '{"iter": 5, "lo')
    write_run(tmp_path, "20260101_110000", [])
    assert read(tmp_path).iterations == 4
    assert History().seconds() is None and History().memory() is None
