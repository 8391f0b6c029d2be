# SPDX-License-Identifier: Apache-2.0
"""A long test: kills at random moments, and growth of memory and open files; prints a table.

``python tests/soak.py`` takes about 20 minutes on two cores. It needs Linux and what
``pip install "mmeformer[all]"`` installs. The exit status is 1 if a figure is not as it should be.

Kills: trainings of the tiny models, with validations, averaged weights, early stopping and the
best model, are killed again and again, each in a new process: by SIGKILL, by SIGTERM (which
saves), or by
two SIGTERMs. In the end each has to be, bit for bit, what it is without kills.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import tiny
import torch
from mmengine.hooks import Hook

from mmeformer.training import engine
from mmeformer.training.preemption import PREEMPTED, StopRequest

ITERATIONS = 8
CHAIN = 5
"""Kills of a training before it may end."""
KILL, STOP, TWICE = "SIGKILL", "SIGTERM", "SIGTERM twice"


class Kills:
    """Trainings of all tasks that are killed at random moments.

    Args:
        folder: for data and runs.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []
        self.wrong: list[str] = []
        self.runs = 0
        self.whole: dict[str, float] = {}
        """Seconds of a training without kills."""

    def start(self, task: str, work_dir: Path) -> int:
        """The process id of a training that goes on from the last checkpoint, or begins."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            # Two signals in a row are two, however short the time between them.
            StopRequest.SAME = 0
            torch.set_num_threads(1)
            log = os.open(work_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            config = tiny.everything(task, self.folder / task, ITERATIONS)
            tiny.train(config, work_dir, resume="auto")
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def prepare(self, task: str) -> None:
        """Train once without kills."""
        started = time.monotonic()
        child = self.start(task, self.folder / f"{task}-unbroken")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 0:
            raise SystemExit(f"the training of {task} fails without kills: {code}")
        self.whole[task] = time.monotonic() - started

    def run(self, task: str, deadline: float) -> None:
        """One training with some kills."""
        work_dir = self.folder / f"{task}-{self.runs}"
        self.runs += 1
        for _ in range(CHAIN):
            kind = self.random.choice([KILL, KILL, STOP, TWICE])
            child = self.start(task, work_dir)
            # The time of a training without kills: later ones are shorter, and may end by then.
            time.sleep(self.random.uniform(0, self.whole[task]))
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                os.kill(child, signal.SIGKILL if kind == KILL else signal.SIGTERM)
                if kind == TWICE:
                    time.sleep(self.random.uniform(0, 0.5))
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if not ended:
                        os.kill(child, signal.SIGTERM)
                self.counts[kind] += 1
            if not ended:
                _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, PREEMPTED, -signal.SIGKILL, -signal.SIGTERM):
                self.lost.append(f"{work_dir.name}: exit status {code} after {kind}")
                return
            if code == 0 or time.monotonic() > deadline:
                break
        code = os.waitstatus_to_exitcode(os.waitpid(self.start(task, work_dir), 0)[1])
        if code != 0:
            self.lost.append(f"{work_dir.name}: exit status {code} without a kill")
            return
        name = f"iter_{ITERATIONS}.pth"
        first, second = self.folder / f"{task}-unbroken", work_dir
        try:
            tiny.assert_same_state(first / name, second / name)
            files = [sorted(path.name for path in at.glob("*.pth")) for at in (first, second)]
            assert files[0] == files[1], files
        except (AssertionError, FileNotFoundError) as error:
            self.wrong.append(f"{work_dir.name}: {error}")
            return
        shutil.rmtree(work_dir)

    @property
    def total(self) -> int:
        """Kills so far."""
        return sum(self.counts.values())


class Growth(Hook):
    """Memory (MB) and open files of this process, at some iterations."""

    priority = "LOWEST"

    def __init__(self, every: int) -> None:
        self.every = every
        self.memory: list[float] = []
        self.files: list[int] = []

    def measure(self) -> None:
        """Add the figures of now."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.files.append(len(os.listdir("/proc/self/fd")))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Measure every some iterations."""
        if self.every_n_train_iters(runner, self.every):
            self.measure()

    def report(self) -> dict:
        """From the first measurement, which follows the warm-up, to the last."""
        return dict(memory=[self.memory[0], self.memory[-1]], files=[self.files[0], self.files[-1]])


def in_child(function) -> dict:
    """The result of a function that runs in a copy of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reading)
            log = os.open(os.devnull, os.O_WRONLY)
            os.dup2(log, 1)
            torch.set_num_threads(1)
            os.write(writing, json.dumps(function()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("a part of the test has failed; its message is above")
    return json.loads(text)


def training(folder: Path, iterations: int) -> dict:
    """Growth of a training with checkpoints and validations, after a tenth of it."""
    config = tiny.segmentation(folder, iterations)
    config.train_dataloader.batch_size = 1
    config.train_cfg.val_interval = config.default_hooks.checkpoint.interval = iterations // 20
    config.default_hooks.logger.interval = 50
    config.work_dir = str(folder / "growth")
    runner = engine.build_train_runner(config)
    growth = Growth(iterations // 10)
    runner.register_hook(growth)
    runner.train()
    return growth.report()


def prediction(folder: Path, count: int) -> dict:
    """Growth of a prediction on many images, after a tenth of them."""
    from mmeformer.inference import Settings, run
    from mmeformer.inference.inputs import Source
    from mmeformer.inference.predictor import load_predictor

    config = tiny.small_config("detection")
    predictor = load_predictor(config, tiny.save_trained(config, folder), device="cpu")
    path = folder / "picture.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    sources = [Source(path, f"{number}.png", str(number)) for number in range(count)]
    out = folder / "predictions"
    out.mkdir()
    growth = Growth(0)
    for status in run(predictor, sources, out, Settings(pictures=False)):
        if status.done % (count // 10) == 0:
            growth.measure()
    return growth.report()


def main() -> int:
    """Run all parts; returns 1 if a figure is not as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="number of kills (%(default)s)")
    parser.add_argument(
        "--iterations", type=int, default=2000, help="of the training that is measured; 0 for none"
    )
    parser.add_argument("--images", type=int, default=5000, help="to predict on; 0 for none")
    parser.add_argument("--minutes", type=float, default=20, help="kills end after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    args = parser.parse_args()
    started = time.monotonic()
    rows: list[tuple[str, str, str, bool]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        for label, function, count in (
            ("training iterations", training, args.iterations),
            ("predicted images", prediction, args.images),
        ):
            if not count:
                continue
            part = folder / function.__name__
            part.mkdir()
            found = in_child(
                lambda function=function, part=part, count=count: function(part, count)
            )
            (before, after), files = found["memory"], found["files"]
            growth = after / before - 1
            text = f"{before:.0f} -> {after:.0f} MB ({growth:+.1%})"
            rows.append((f"memory, {count} {label}", text, "below 2%", growth < 0.02))
            text = f"{files[0]} -> {files[1]}"
            rows.append((f"open files, {count} {label}", text, "constant", files[0] == files[1]))
            print(*rows[-2:], sep="\n", flush=True)
        kills = Kills(folder, args.seed)
        deadline = started + 60 * args.minutes
        for task in tiny.SCORES:
            kills.prepare(task)
        while kills.total < args.kills and time.monotonic() < deadline:
            for task in tiny.SCORES:
                kills.run(task, deadline)
                print(f"{kills.total} kills, {kills.runs} trainings", flush=True)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kills.counts.items()))
    rows += [
        ("kills", f"{kills.total} ({counts})", f"{args.kills}", kills.total >= args.kills),
        ("trainings", f"{kills.runs} of {len(tiny.SCORES)} tasks", "", True),
        ("lost runs", str(len(kills.lost)), "0", not kills.lost),
        ("wrong resumes", str(len(kills.wrong)), "0", not kills.wrong),
    ]
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes\n\n| What | Found | Wanted | |")
    print("|---|---|---|---|")
    for what, found, wanted, good in rows:
        print(f"| {what} | {found} | {wanted} | {'ok' if good else 'FAILED'} |")
    for line in kills.lost + kills.wrong:
        print(line)
    return 0 if all(good for *_, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
