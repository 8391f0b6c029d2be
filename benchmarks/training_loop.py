# SPDX-License-Identifier: Apache-2.0
"""Measure where the time of a training iteration goes: data, forward parts, backward, optimizer.

    python benchmarks/training_loop.py detection --iterations 10
    python benchmarks/training_loop.py detection --size 800 1344 --batch 1 --iterations 4

Trains a quickstart's config on its generated data (``--size`` resizes the images) and prints the
share of each part. Parts that begin with "-" are included in the part above them.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from mmengine.hooks import Hook

from mmeformer import configs, tasks
from mmeformer.training import engine

PARTS = {
    "data preprocessor": ("data_preprocessor", "forward"),
    "backbone": ("backbone", "forward"),
    "neck": ("neck", "forward"),
    "RPN and its losses": ("rpn_head", "loss_and_predict"),
    "- assignment": ("rpn_head.assigner", "assign"),
    "RoI heads and their losses": ("roi_head", "loss"),
    "- mask targets": ("roi_head.mask_head", "get_targets"),
    "head and its losses": ("bbox_head", "loss"),
    "- assignment of boxes": ("bbox_head.assigner", "assign"),
    "segmentation head and its loss": ("decode_head", "loss"),
}


class Clock(Hook):
    """Sums up the time of parts and of whole iterations, without the first two iterations."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.iterations = 0
        self.running = False

    def watch(self, owner, method: str, label: str) -> None:
        """Time the calls of a method."""
        plain = getattr(owner, method)

        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                if self.running:
                    self.seconds[label] += time.perf_counter() - started

        setattr(owner, method, timed)

    def before_train(self, runner) -> None:
        """Watch the parts that the model has."""
        for label, (path, method) in PARTS.items():
            owner = runner.model
            for name in path.split("."):
                owner = getattr(owner, name, None)
            if hasattr(owner, method):
                self.watch(owner, method, label)
        self.watch(runner.optim_wrapper, "backward", "backward")
        self.watch(runner.optim_wrapper, "step", "clipping and optimizer")

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Data has arrived: add the time spent waiting for it."""
        if self.running:
            self.seconds["waiting for data"] += time.perf_counter() - self.ended
        self.started = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """The iteration is over, including hooks and logging: add its time."""
        now = time.perf_counter()
        if self.running:
            self.iterations += 1
            self.seconds["iteration"] += now - self.ended
        self.running = self.running or runner.iter >= 1
        self.ended = now


def main() -> None:
    """Train a little and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(tasks.TASKS))
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"))
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    quickstart = tasks.load(tasks.TASKS[args.task].quickstart)
    config = configs.load_config(quickstart.config)
    quickstart.generate(Path(config.data_root))
    config.train_cfg.max_iters = config.train_cfg.val_interval = args.iterations + 2
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        config[key] = None
    config.train_cfg.pop("val_interval")
    config.default_hooks.checkpoint.interval = 10**9
    config.default_hooks.checkpoint.save_last = False
    if args.batch:
        config.train_dataloader.batch_size = args.batch
    if args.size:
        resize = dict(type="Resize", scale=tuple(args.size[::-1]), keep_ratio=False)
        config.train_dataloader.dataset.pipeline.insert(2, resize)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        runner = engine.build_train_runner(config)
        runner.register_hook(clock)
        runner.train()
    total = clock.seconds.pop("iteration") / clock.iterations
    print(f"\n{args.task}: {total:.3f} s per iteration\n\n| part | ms | share |\n|---|---|---|")
    known = 0.0
    for label, seconds in clock.seconds.items():
        each = seconds / clock.iterations
        known += 0 if label.startswith("-") else each
        print(f"| {label} | {1e3 * each:.0f} | {each / total:.1%} |")
    rest = total - known
    print(f"| everything else (hooks, logging) | {1e3 * rest:.0f} | {rest / total:.1%} |")


if __name__ == "__main__":
    main()
