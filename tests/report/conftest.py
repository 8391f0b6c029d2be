# SPDX-License-Identifier: Apache-2.0
"""Work directories of tiny trainings."""

import json

import numpy as np
import pytest
import tiny

ROWS = 40


def log(loss_at):
    """Lines as mmengine logs them: of iterations, and of a validation after every tenth."""
    for number in range(1, ROWS + 1):
        row = dict(lr=0.01 / number, loss=loss_at(number), loss_cls=0.6 * loss_at(number))
        yield dict(row, time=0.2, data_time=0.02, iter=number, step=number)
        if number % 10 == 0:
            yield dict(score=0.01 * number, other=0.5, step=number)


# That of segmentation is made after trainings too, by tests that always run.
TASKS = tiny.all_tasks("segmentation", "rotated", "classification")


@pytest.fixture(scope="session", params=TASKS)
def work_dir(request, tmp_path_factory):
    """Of a training: config, log, and the checkpoint of a model that finds something."""
    task = request.param
    folder = tmp_path_factory.mktemp(f"report-{task}")
    config = tiny.ALL_TASKS[task](folder / "data")
    if task != "segmentation":
        for step in config.test_dataloader.dataset.pipeline:
            if step.type.endswith("Resize"):
                step.scale = (64, 64)
    work_dir = folder / "run"
    logs = work_dir / "20260101_100000" / "vis_data"
    logs.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = log(lambda number: float(np.exp(-number / 15) + 0.02 * random.random()))
    (logs / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.default_hooks.checkpoint.save_best = "score"
    config.dump(work_dir / "config.py")
    tiny.save_trained(config, work_dir)
    return work_dir
