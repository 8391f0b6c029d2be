# SPDX-License-Identifier: Apache-2.0
"""Measure how long checkpoints stop a training, and the memory that they take.

    python benchmarks/checkpoint_stall.py --size 480 --iterations 8

Trains the quickstart's Mask R-CNN with the channels of the published one (about 100 MB of weights,
three times that with AdamW's state) and saves at every second iteration. The stall is the time that
the training loop spends in saving; the rest of a save happens in the background.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from unittest import mock

import torch
from mmengine.hooks import Hook

from mmeformer import configs, tasks
from mmeformer.training import engine, saving
from mmeformer.training import runner as runners
from mmeformer.work_dirs import named_checkpoint

CHANNELS = {
    "model.neck.out_channels": 256,
    "model.rpn_head.in_channels": 256,
    "model.rpn_head.feat_channels": 256,
    "model.roi_head.bbox_roi_extractor.out_channels": 256,
    "model.roi_head.bbox_head.in_channels": 256,
    "model.roi_head.bbox_head.fc_out_channels": 1024,
    "model.roi_head.mask_roi_extractor.out_channels": 256,
    "model.roi_head.mask_head.in_channels": 256,
    "model.roi_head.mask_head.conv_out_channels": 256,
}


class Clock(Hook):
    """Times of iterations, from the begin of the step to the end of the optimizer's."""

    priority = "ABOVE_NORMAL"

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: list[int] = []
        """Peak of this process after each iteration, in MB."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Start."""
        self.started = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Stop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        self.memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def timed(function, seconds: list[float]):
    """``function``, which appends the time of each call to ``seconds``."""

    def replacement(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    return replacement


def main() -> None:
    """Train a little and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=480, help="side of the images")
    parser.add_argument("--iterations", type=int, default=8)
    args = parser.parse_args()
    quickstart = tasks.load(tasks.TASKS["detection"].quickstart)
    config = configs.load_config(quickstart.config, CHANNELS)
    quickstart.generate(Path(config.data_root))
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        config[key] = None
    config.train_cfg.pop("val_interval")
    config.train_cfg.max_iters = args.iterations
    config.train_dataloader.batch_size = 2
    config.default_hooks.checkpoint.update(interval=2, by_epoch=False, save_best=None)
    resize = dict(type="Resize", scale=(args.size, args.size), keep_ratio=False)
    config.train_dataloader.dataset.pipeline.insert(2, resize)
    clock, stalls, writes = Clock(), [], []
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        runner = engine.build_train_runner(config)
        runner.register_hook(clock)
        save = timed(runners.Runner.save_checkpoint, stalls)
        write = timed(saving.write_checkpoint, writes)
        with mock.patch.object(runners.Runner, "save_checkpoint", save):
            with mock.patch.object(runners, "write_checkpoint", write):
                runner.train()
        file = Path(named_checkpoint(folder)).stat().st_size
    weights = sum(tensor.nbytes for tensor in runner.model.state_dict().values())
    iteration = median(clock.seconds[1:])
    print(f"weights {weights / 1e6:.0f} MB, checkpoint {file / 1e6:.0f} MB, {args.size} px")
    print(f"iteration {iteration:.3f} s, background write {mean(writes):.3f} s")
    # The first save allocates the memory of the copy, which the others use again.
    print(f"first save {stalls[0]:.3f} s, each other {mean(stalls[1:]):.3f} s")
    print(f"stall of a save: {mean(stalls[1:]) / iteration:.1%} of an iteration")
    print(
        f"peak memory before the first save {clock.memory[1]} MB, at the end {clock.memory[-1]} MB"
    )


if __name__ == "__main__":
    main()
