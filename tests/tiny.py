# SPDX-License-Identifier: Apache-2.0
"""Configs of the tasks that train a few steps in seconds, and runs in processes of their own."""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmeformer import configs
from mmeformer.synthetic.aerial import write_dota_dataset
from mmeformer.synthetic.masks import write_mask_dataset
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.training import engine

ARCH = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
ITERATIONS = 8


def _schedule(config: Config, iterations: int) -> None:
    """Iterations of two images without validation; a checkpoint after every second one."""
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=10**6)
    config.train_dataloader.sampler = dict(type="InfiniteSampler", shuffle=True)
    config.train_dataloader.batch_sampler = None
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=iterations)
    ]
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    config.default_hooks.logger.update(interval=1)
    config.default_hooks.checkpoint.update(
        by_epoch=False, interval=2, max_keep_ckpts=1, save_best=None
    )
    config.log_processor = dict(window_size=1, by_epoch=False)
    config.randomness = dict(seed=1)


def detection(folder: Path, iterations: int = ITERATIONS) -> Config:
    """Mask R-CNN on shapes of 64 px below ``folder``, with random flips."""
    root = write_coco_dataset(folder / "coco", train=8, val=2, size=64)
    config = configs.load_config("detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py")
    model = config.model
    model.backbone.update(arch=ARCH, drop_path_rate=0.2)
    model.neck.update(in_channels=list(ARCH["widths"]), out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    heads = model.roi_head
    heads.bbox_roi_extractor.out_channels = heads.mask_roi_extractor.out_channels = 16
    heads.bbox_head.update(in_channels=16, fc_out_channels=64)
    heads.mask_head.update(in_channels=16, conv_out_channels=16)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(root)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(root / "annotations/instances_val2017.json")
    _schedule(config, iterations)
    return config


def segmentation(folder: Path, iterations: int = ITERATIONS) -> Config:
    """Semantic FPN on shapes of 64 px below ``folder``, with random flips."""
    root = write_mask_dataset(folder / "masks", train=8, val=2, size=64)
    config = configs.load_config("segmentation/semantic-fpn_efficientformerv2-s0_quickstart.py")
    model = config.model
    model.data_preprocessor.size = (64, 64)
    model.backbone.update(arch=ARCH, drop_path_rate=0.2)
    model.neck.update(in_channels=list(ARCH["widths"]), out_channels=16)
    model.decode_head.update(in_channels=[16] * 4, channels=16)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(root)
    _schedule(config, iterations)
    return config


def rotated(folder: Path, iterations: int = ITERATIONS) -> Config:
    """Rotated GFL on scenes of 64 px below ``folder``, with random flips."""
    root = write_dota_dataset(folder / "aerial", train=8, val=2, size=64)
    config = configs.load_config("rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_quickstart.py")
    model = config.model
    model.backbone.update(arch=ARCH, drop_path_rate=0.2)
    indices = model.backbone.get("out_indices", (0, 1, 2, 3))
    # The head's group norms have 32 groups, whose last maps are of one pixel.
    model.neck.update(in_channels=[ARCH["widths"][i] for i in indices], out_channels=64)
    model.bbox_head.update(in_channels=64, feat_channels=64)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(root)
    _schedule(config, iterations)
    return config


TASKS = {"detection": detection, "segmentation": segmentation, "rotated": rotated}


class Recorder(Hook):
    """Keeps the loss of every iteration, and calls ``at[iteration]`` before one begins."""

    def __init__(self, at=None) -> None:
        self.losses: dict[int, float] = {}
        self.at = at or {}

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter in self.at:
            self.at[runner.iter]()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses[runner.iter] = outputs["loss"].item()


def train(config: Config, work_dir: Path, resume=None, at=None, launcher="none") -> dict:
    """Losses by iteration of a training in this process, on one thread."""
    config = Config(config.copy().to_dict())
    config.work_dir = str(work_dir)
    threads = torch.get_num_threads()
    # Sums of several threads may differ in the last bit.
    torch.set_num_threads(1)
    try:
        runner = engine.build_train_runner(config, resume=resume, launcher=launcher)
        recorder = Recorder(at)
        runner.register_hook(recorder)
        runner.train()
    finally:
        torch.set_num_threads(threads)
    return recorder.losses


def fork(function, world_size: int = 1, timeout: float = 60) -> list[int]:
    """Run ``function(rank)`` in processes over gloo; their exit codes (negative: the signal).

    They are copies of this process, which spares them its imports.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(world_size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            # OpenMP's threads do not exist in a copy of the process that started them.
            torch.set_num_threads(1)
            # Say where a process hangs before it is killed.
            faulthandler.dump_traceback_later(timeout - 5, file=sys.__stderr__)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            function(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < world_size and time.monotonic() < end:
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    hung = set(children) - set(codes)
    for child in hung:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if hung:
        raise TimeoutError(f"{len(hung)} of {world_size} processes ran longer than {timeout} s")
    return [codes[child] for child in children]


def equal(first: dict, second: dict) -> bool:
    """Whether two runs had the very same losses in the iterations of ``second``."""
    shared = [first[iteration] for iteration in second]
    return bool(second) and np.array_equal(shared, list(second.values()))
