# SPDX-License-Identifier: Apache-2.0
"""Two processes do what one does with the double batch, and die together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from mmeformer.paths import tools_dir
from mmeformer.training import device

pytestmark = pytest.mark.forks

# Group norms: what a batch norm of one process sees, on a CPU another does not.
NORM = dict(type="GN", num_groups=4)


def one_step(config):
    """Make a config take one plain step with learning rate 1: weights change by the gradient."""
    config.train_cfg.max_iters = 1
    config.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1.0))
    config.param_scheduler = []
    # Dropped paths are drawn per process; norms of the backbone stay as they are, as published.
    config.model.backbone.update(drop_path_rate=0.0, norm_eval=True)
    config.model.neck.norm_cfg = NORM
    return config


def segmentation(folder):
    config = one_step(tiny.segmentation(folder))
    config.model.decode_head.update(norm_cfg=NORM, dropout_ratio=0.0)
    return config


def rotated(folder):
    config = one_step(tiny.rotated(folder))
    # The quality focal loss weighs boxes by their scores, which untrained add up to less than the 1
    # that the divisor is at least, in each process.
    config.model.bbox_head.loss_cls = dict(
        type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0
    )
    return config


@pytest.mark.parametrize(
    "make", [segmentation, pytest.param(rotated, marks=pytest.mark.slow)], ids=lambda f: f.__name__
)
def test_gradients_equal_those_of_the_double_batch(folder, tmp_path, make):
    """With the same images and the same flips, since those follow from the place in the schedule.

    Mask R-CNN samples proposals per image and averages per process, so that it cannot be equal.
    """
    config = make(folder)
    assert config.train_dataloader.batch_size == 2
    single = tiny.train(config, tmp_path / "single")
    config.train_dataloader.batch_size = 1

    def one(rank):
        losses = tiny.train(config, tmp_path / "double", launcher="pytorch")
        (tmp_path / f"loss-{rank}.json").write_text(json.dumps(losses[0]))

    assert tiny.fork(one, world_size=2) == [0, 0]
    losses = [json.loads((tmp_path / f"loss-{rank}.json").read_text()) for rank in (0, 1)]
    assert losses[0] != losses[1]
    assert sum(losses) / 2 == pytest.approx(single[0], rel=1e-5)
    weights = [
        torch.load(tmp_path / name / "iter_1.pth", weights_only=False)["state_dict"]
        for name in ("single", "double")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="names of threads")
def test_threads_of_gloo_end_before_python(folder, tmp_path):
    """One that still works while Python ends would abort a process that has done all."""
    config = tiny.segmentation(folder, iterations=1)

    def threads():
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return [name for name in names if "gloo" in name]

    def one(rank):
        tiny.train(config, tmp_path, launcher="pytorch")
        assert threads()
        device._leave_process_group()
        assert not threads()

    assert tiny.fork(one, world_size=2) == [0, 0]


def test_lone_process_does_not_wait_for_the_dead(folder, tmp_path):
    def die():
        raise ValueError("a fault of rank 1")

    config = tiny.segmentation(folder)

    def one(rank):
        at = {2: die} if rank == 1 else {}
        tiny.train(config, tmp_path, launcher="pytorch", at=at)

    assert tiny.fork(one, world_size=2) == [1, 1]


@pytest.mark.slow
def test_launcher_ends_the_job_with_the_traceback(folder, tmp_path):
    (tmp_path / "fault.py").write_text(
        "from mmengine.hooks import Hook\n"
        "from mmengine.registry import HOOKS\n"
        "@HOOKS.register_module()\n"
        "class Fault(Hook):\n"
        "    def before_train_iter(self, runner, batch_idx, data_batch=None):\n"
        "        if runner.rank == 1 and runner.iter == 2:\n"
        "            self.break_down()\n"
        "    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):\n"
        "        pass\n"
        "    def break_down(self):\n"
        "        raise ValueError('a fault of rank 1')\n"
    )
    config = tiny.segmentation(folder)
    config.custom_imports.imports.append("fault")
    config.custom_hooks.append(dict(type="Fault"))
    config.dump(tmp_path / "config.py")
    result = subprocess.run(
        [tools_dir() / "dist_train.sh", tmp_path / "config.py", "2", "--work-dir", tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(tools_dir().parent)]),
        },
    )
    assert result.returncode == 1
    assert "in break_down" in result.stderr and "a fault of rank 1" in result.stderr
    assert Path(tmp_path, "iter_2.pth").is_file()
