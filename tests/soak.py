# SPDX-License-Identifier: Apache-2.0
"""A long test: kills at random moments, and growth of memory and open files; prints a table.

``python tests/soak.py`` takes about 20 minutes on two cores. It needs Linux and what
``pip install "mmeformer[all]"`` installs. The exit status is 1 if a figure is not as it should be.

Kills: trainings of the tiny models, with validations, averaged weights, early stopping and the
best model, are killed again and again, each in new processes (every third training has two):
by SIGKILL (of all processes or one), by SIGTERM (which saves), or by two SIGTERMs. In the end each
has to be, bit for bit, what it is without kills.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import socket
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

from mmeformer.signals import PREEMPTED, before_errors, leave_on_signals
from mmeformer.training import engine
from mmeformer.training.preemption import StopRequest

ITERATIONS = 8
CHAIN = 5
"""Kills of a training before it may end."""
KILL, LONE, STOP, TWICE = "SIGKILL", "SIGKILL of one of two", "SIGTERM", "SIGTERM twice"


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
        self.whole: dict[tuple[str, int], float] = {}
        """Seconds of a training without kills, by task and number of processes."""

    def start(self, task: str, world: int, work_dir: Path) -> list[int]:
        """The process ids of a training that goes on from the last checkpoint, or begins."""
        sys.stdout.flush()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                self.train(task, work_dir, rank, world, port)
            children.append(child)
        return children

    def train(self, task: str, work_dir: Path, rank: int, world: int, port: int) -> None:
        """Be a process of a training, to its end."""
        code = 1
        try:
            leave_on_signals()
            # Two signals in a row are two, however short the time between them.
            StopRequest.SAME = 0
            torch.set_num_threads(1)
            log = os.open(work_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            config = tiny.everything(task, self.folder / task, ITERATIONS)
            launcher = "none" if world == 1 else "pytorch"
            with before_errors():
                tiny.train(config, work_dir, resume="auto", launcher=launcher)
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    @staticmethod
    def ends(children: list[int], wait: bool) -> dict[int, int]:
        """Exit codes of those that have ended, or of all when they have."""
        codes = {}
        for child in children:
            ended, status = os.waitpid(child, 0 if wait else os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        return codes

    def prepare(self, task: str, world: int) -> None:
        """Train once without kills; data and imports are ready for the copies of this process."""
        if world == 1:
            config = tiny.everything(task, self.folder / task, ITERATIONS)
            config.work_dir = str(self.folder / f"{task}-imports")
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                engine.build_train_runner(config)
        started = time.monotonic()
        children = self.start(task, world, self.folder / f"{task}-unbroken-{world}")
        codes = self.ends(children, wait=True)
        if any(codes.values()):
            raise SystemExit(f"the training of {task} fails without kills: {codes}")
        self.whole[task, world] = time.monotonic() - started

    def kill(self, children: list[int], kind: str, pause: float) -> dict[int, int]:
        """Exit codes of processes that get one or two signals."""
        codes: dict[int, int] = {}
        for _ in range(2 if kind == TWICE else 1):
            left = [child for child in children if child not in codes]
            if kind == LONE:
                left = left[:1] if self.random.random() < 0.5 else left[-1:]
            for child in left:
                os.kill(child, signal.SIGKILL if kind in (KILL, LONE) else signal.SIGTERM)
            if kind == TWICE:
                time.sleep(pause)
                codes |= self.ends([child for child in children if child not in codes], False)
        return codes | self.ends([child for child in children if child not in codes], True)

    def run(self, task: str, deadline: float) -> None:
        """One training with some kills."""
        world = 2 if self.runs % 3 == 2 else 1
        work_dir = self.folder / f"{task}-{self.runs}"
        self.runs += 1
        for _ in range(CHAIN):
            kind = self.random.choice([KILL, LONE if world == 2 else KILL, STOP, TWICE])
            children = self.start(task, world, work_dir)
            # The time of a training without kills: later ones are shorter, and may end by then.
            time.sleep(self.random.uniform(0, self.whole[task, world]))
            codes = self.ends(children, wait=False)
            left = [child for child in children if child not in codes]
            if left:
                self.counts[kind] += 1
                codes |= self.kill(left, kind, self.random.uniform(0, 0.5))
            allowed = {0, PREEMPTED, -signal.SIGKILL, -signal.SIGTERM}
            if kind == LONE:
                # The other one fails.
                allowed.add(1)
            if not set(codes.values()) <= allowed:
                found = list(codes.values())
                self.lost.append(self.told(work_dir, f"exit status {found} after {kind}"))
                return
            if not any(codes.values()) or time.monotonic() > deadline:
                break
        codes = self.ends(self.start(task, world, work_dir), wait=True)
        if any(codes.values()):
            found = list(codes.values())
            self.lost.append(self.told(work_dir, f"exit status {found} without a kill"))
            return
        name = f"iter_{ITERATIONS}.pth"
        first, second = self.folder / f"{task}-unbroken-{world}", work_dir
        try:
            tiny.assert_same_state(first / name, second / name)
            files = [sorted(path.name for path in at.glob("*.pth")) for at in (first, second)]
            assert files[0] == files[1], files
        except (AssertionError, FileNotFoundError) as error:
            self.wrong.append(f"{work_dir.name}: {error}")
            return
        shutil.rmtree(work_dir)

    @staticmethod
    def told(work_dir: Path, what: str) -> str:
        """What happened to a run, and what it said last."""
        lines = work_dir.with_suffix(".log").read_text(errors="replace").splitlines()
        return "\n  ".join([f"{work_dir.name}: {what}. The end of its log:", *lines[-200:]])

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
            for world in (1, 2):
                kills.prepare(task, world)
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
