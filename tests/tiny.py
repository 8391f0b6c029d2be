# SPDX-License-Identifier: Apache-2.0
"""Tiny models of all tasks: configs, checkpoints, exports, and trainings in seconds."""

import contextlib
import copy
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from torch import nn
from trained_like import trained_like

from mmeformer import configs
from mmeformer.synthetic.aerial import write_dota_dataset
from mmeformer.synthetic.masks import write_mask_dataset
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.tasks import TASKS as ROWS
from mmeformer.training import engine

ARCH = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 1, 1))
WIDTH = 32
"""Channels of necks and heads."""

QUICKSTARTS = {
    "detection": "detection/mask-rcnn_efficientformerv2-s0_fpn_quickstart.py",
    "segmentation": "segmentation/semantic-fpn_efficientformerv2-s0_quickstart.py",
    "rotated": "rotated/rotated-gfl-le135_efficientformerv2-s0_fpn_quickstart.py",
    "classification": "classification/efficientformerv2-s0_quickstart.py",
}
LIGHT = "detection/gfl-lite_efficientformerv2-s0_pafpn_quickstart.py"
LIGHT_CUSTOM = "detection/gfl-lite_efficientformerv2-s0_pafpn_custom.py"
LIGHT_MASKS = "detection/rtmdet-ins-lite_efficientformerv2-s0_pafpn_custom.py"
FASTER_RCNN_CUSTOM = "detection/faster-rcnn_efficientformerv2-s0_fpn_custom.py"
ITERATIONS = 8


# --- configs -------------------------------------------------------------------------------------


def network(task: str, path: str | None = None) -> Config:
    """The task's quickstart, or another config of it, with a tiny network."""
    config = configs.load_config(path or QUICKSTARTS[task])
    model = config.model
    model.backbone.update(arch=ARCH)
    if task == "classification":
        model.head.in_channels = ARCH["widths"][3]
        return config
    model.neck.update(
        in_channels=[ARCH["widths"][i] for i in model.backbone.get("out_indices", range(4))],
        out_channels=WIDTH,
    )
    if task == "segmentation":
        model.decode_head.update(in_channels=[WIDTH] * 4, channels=16)
    elif "rpn_head" in model:
        model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
        heads = model.roi_head
        heads.bbox_roi_extractor.out_channels = WIDTH
        heads.bbox_head.update(in_channels=WIDTH, fc_out_channels=32)
        if heads.mask_head is not None:
            heads.mask_roi_extractor.out_channels = WIDTH
            heads.mask_head.update(in_channels=WIDTH, conv_out_channels=16)
    else:
        model.bbox_head.update(in_channels=WIDTH, feat_channels=WIDTH, stacked_convs=1)
        if "norm_cfg" in model.bbox_head:
            # A group of one channel has no variance on the coarsest map, which is one pixel large.
            model.bbox_head.norm_cfg = dict(type="GN", num_groups=4)
        else:
            # Without training, every distance is half of the largest: less than a small picture.
            if "reg_max" in model.bbox_head:
                model.bbox_head.reg_max = 4
            # After a few iterations too, the statistics are those of the data.
            model.bbox_head.norm_cfg = dict(type="BN", momentum=0.9)
    return config


def small_config(task: str, path: str | None = None) -> Config:
    """A tiny network that predicts on pictures of 64 px, with few candidates.

    Args:
        task: its quickstart is the network's.
        path: of another config of the task.
    """
    config = network(task, path)
    if task == "classification":
        return _of_animals(config)
    if "rpn_head" in config.model:
        config.model.test_cfg.rpn.update(nms_pre=40, max_per_img=30)
    elif task != "segmentation":
        config.model.test_cfg.update(nms_pre=50, score_thr=0.2)
    if task != "segmentation":
        for step in config.test_dataloader.dataset.pipeline:
            if step.type.endswith("Resize"):
                step.scale = (64, 64)
    return config


def _training(task: str, root: Path, iterations: int, path: str | None = None) -> Config:
    """A tiny network with dropped paths, trained on ``root`` two images at a time.

    There is no validation; every second iteration writes a checkpoint.
    """
    config = network(task, path)
    config.model.backbone.drop_path_rate = 0.2
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=10**6)
    config.train_dataloader.sampler = dict(type="InfiniteSampler", shuffle=True)
    config.train_dataloader.batch_sampler = None
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=iterations)
    ]
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(root)
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    config.default_hooks.logger.update(interval=1)
    config.default_hooks.checkpoint.update(
        by_epoch=False, interval=2, max_keep_ckpts=1, save_best=None
    )
    config.log_processor = dict(window_size=1, by_epoch=False)
    config.randomness = dict(seed=1)
    return config


def detection(folder: Path, iterations: int = ITERATIONS) -> Config:
    """Mask R-CNN on shapes of 64 px below ``folder``, with random flips."""
    root = write_coco_dataset(folder / "coco", train=8, val=2, size=64)
    config = _training("detection", root, iterations)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(root / "annotations/instances_val2017.json")
    return config


def boxes_only(folder: Path, iterations: int = ITERATIONS, path: str = LIGHT_CUSTOM) -> Config:
    """A template for data with boxes only, on shapes of 64 px without masks."""
    root = write_coco_dataset(folder / "coco", train=8, val=2, size=64)
    for labels in (root / "annotations").glob("*.json"):
        content = json.loads(labels.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        labels.write_text(json.dumps(content))
    return own_data(root, iterations, path)


def with_masks(folder: Path, iterations: int = ITERATIONS) -> Config:
    """The template of the light detector with masks, on shapes of 64 px."""
    return own_data(write_coco_dataset(folder / "coco", train=8, val=2, size=64), iterations)


def own_data(root: Path, iterations: int, path: str = LIGHT_MASKS) -> Config:
    """A template on a data set, as its users fill it in, but from scratch."""
    content = json.loads((root / "annotations/instances_train2017.json").read_text())
    classes = tuple(category["name"] for category in content["categories"])
    config = _training("detection", root, iterations, path)
    config.model.backbone.update(norm_eval=False, layer_scale_init_value=1.0, init_cfg=None)
    config.model.neck.norm_cfg = dict(type="BN")
    config.model.get("roi_head", config.model).bbox_head.num_classes = len(classes)
    config.log_processor.by_epoch = False
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.metainfo = dict(classes=classes)
        for step in loader.dataset.pipeline:
            if "scale" in step:
                step.scale = (64, 64)
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(root / "annotations/instances_val2017.json")
    return config


def segmentation(folder: Path, iterations: int = ITERATIONS) -> Config:
    """Semantic FPN on shapes of 64 px below ``folder``, with random flips."""
    root = write_mask_dataset(folder / "masks", train=8, val=2, size=64)
    config = _training("segmentation", root, iterations)
    config.model.data_preprocessor.size = (64, 64)
    return config


def rotated(folder: Path, iterations: int = ITERATIONS) -> Config:
    """Rotated GFL on scenes of 64 px below ``folder``, with random flips."""
    return _training(
        "rotated", write_dota_dataset(folder / "aerial", train=8, val=2, size=64), iterations
    )


ANIMALS = {"cat": (40, 60, 200), "dog": (60, 170, 60), "fox": (200, 80, 40), "owl": (150, 150, 150)}
"""Classes of pictures, and their mean color (blue, green, red)."""


def class_folders(root: Path, train: int = 16, val: int = 8, size: int = 64) -> Path:
    """Noise in the color of its class: ``train/`` and ``val/`` with one folder per class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            name = list(ANIMALS)[index % len(ANIMALS)]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            image = rng.normal(ANIMALS[name], 30, (size, size, 3)).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(root / split / name / f"{index:06d}.png"), image)
    return root


def _of_animals(config: Config) -> Config:
    """The config for the classes of :func:`class_folders`."""
    model = config.model
    model.head.num_classes = model.head.loss.num_classes = len(ANIMALS)
    model.data_preprocessor.num_classes = len(ANIMALS)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.metainfo = dict(classes=tuple(ANIMALS))
    return config


def classification(folder: Path, iterations: int = ITERATIONS) -> Config:
    """A classifier of pictures of 64 px below ``folder``, with random flips."""
    root = class_folders(folder / "folders", train=8, val=2)
    return _of_animals(_training("classification", root, iterations))


def classifier(root: Path) -> Config:
    """A classifier of pictures in folders of :func:`class_folders`, trained for two epochs."""
    config = _of_animals(network("classification"))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(root)
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    config.train_cfg.update(max_epochs=2, val_interval=2)
    for schedule, (begin, end) in zip(config.param_scheduler, ((0, 1), (1, 2)), strict=True):
        schedule.update(begin=begin, end=end)
    config.default_hooks.checkpoint.update(interval=2)
    config.default_hooks.logger.update(interval=1)
    return config


TASKS = {"detection": detection, "segmentation": segmentation, "rotated": rotated}
"""Tasks that find places in images: by boxes or pixels."""
ALL_TASKS = {**TASKS, "classification": classification}


def all_tasks(*slow: str) -> list:
    """Parameters of a test: :data:`ALL_TASKS`, skipped where a library is not installed.

    Args:
        slow: those that are slow tests.
    """
    import pytest

    params = []
    for task in ALL_TASKS:
        missing = [name for name in ROWS[task].libraries if find_spec(name) is None]
        marks = [pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")]
        params.append(pytest.param(task, marks=marks + [pytest.mark.slow] * (task in slow)))
    return params


SCORES = {
    "detection": "coco/bbox_mAP",
    "segmentation": "mIoU",
    "rotated": "dota/AP50",
    "classification": "accuracy/top1",
}


def everything(task, folder, iterations=4):
    """Averaged weights, the best model, early stopping, and a schedule that follows the scores."""
    config = ALL_TASKS[task](folder, iterations)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.update(save_best=SCORES[task], rule="greater")
    config.custom_hooks += [
        dict(type="EMAHook", momentum=0.3, update_buffers=True),
        dict(type="EarlyStoppingHook", monitor=SCORES[task], rule="greater", patience=9),
    ]
    config.param_scheduler.append(
        dict(type="ReduceOnPlateauLR", monitor=SCORES[task], rule="greater", patience=0)
    )
    return config


# --- trained models and their exports ------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A config with a checkpoint of its model."""

    config: Config
    checkpoint: str
    folder: Path
    """Empty."""

    def copy(self) -> "Trained":
        """With a config of its own, which building the model changes."""
        return replace(self, config=copy.deepcopy(self.config))


def small_trained(folder: Path, task: str, path: str | None = None) -> Trained:
    """The small model of a task or a shipped config, with the weights of :func:`save_trained`."""
    config = small_config(task, path)
    return Trained(config, save_trained(config, folder), folder)


def save_trained(config: Config, folder: Path, seed: int = 0) -> str:
    """A checkpoint with spread weights, so that scores and boxes tell objects apart."""
    from mmeformer.deploy import models

    torch.manual_seed(seed)
    model = trained_like(models.build_model(copy.deepcopy(config)), seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            outputs = ("rpn_cls", "rpn_reg", "fc_cls", "fc_reg", "gfl_cls", "gfl_reg", "fc")
            masks = ("conv_logits", "conv_seg", "rtm_kernel", "projection")
            if name.rpartition(".")[2] in (*outputs, "rtm_cls", "rtm_reg", *masks):
                nn.init.normal_(module.weight, std=1.5 * module.weight[0].numel() ** -0.5)
            if name.endswith("rtm_reg"):
                # Distances below zero are cut off.
                nn.init.ones_(module.bias)
            elif name.endswith("rtm_kernel"):
                # Products of three layers and the features: with less, masks are empty or full.
                # Without their mean over channels: it would give all locations the same mask.
                module.weight.sub_(module.weight.mean(dim=1, keepdim=True)).mul_(40)
    path = folder / "trained.pth"
    meta = dict(dataset_meta=dict(config.test_dataloader.dataset.metainfo))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


EXPORTS = [
    ("segmentation", dict(size=None, preprocessing=False)),
    ("segmentation", dict(size=(64, 96), batch=2, preprocessing=True)),
    ("detection", dict(size=None, preprocessing=True)),
    ("detection", dict(size=(64, 96), batch=2, preprocessing=False)),
    ("rotated", dict(size=None, preprocessing=False)),
    ("rotated", dict(size=(64, 64), preprocessing=True)),
    ("detection", dict(size=None, part="backbone")),
    ("segmentation", dict(size=(32, 64), part="backbone", batch=3, preprocessing=True)),
]
"""(task, request) of every kind of exported file."""


def exported(trained, picture, name="model.onnx", lines=None, folder=None, **request):
    """Export a small model, checked on a real picture too; returns the file."""
    from mmeformer.deploy import export

    out = (folder or trained.folder) / name
    lines = [] if lines is None else lines
    return export.export(
        trained.config,
        trained.checkpoint,
        out,
        export.Request(**{"target": "onnx", **request}),
        images=[picture],
        force=True,
        report=lines.append,
    )


# --- runs ----------------------------------------------------------------------------------------


def kill() -> None:
    """Leave no time for anything."""
    os.kill(os.getpid(), signal.SIGKILL)


class Recorder(Hook):
    """Keeps the loss of every iteration, and calls ``at[iteration]`` before one begins.

    ``kill`` comes after what is being written by then, so that tests know the last checkpoint,
    however slow the disk is.
    """

    def __init__(self, at=None) -> None:
        self.losses: dict[int, float] = {}
        self.at = at or {}

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter in self.at:
            if self.at[runner.iter] is kill:
                runner.writer.wait()
            self.at[runner.iter]()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses[runner.iter] = outputs["loss"].item()


def train(config: Config, work_dir: Path, resume=None, at=None, **choices) -> dict:
    """Losses by iteration of a training in this process, on one thread.

    Args:
        config, work_dir: of the training.
        resume: as in ``build_train_runner``.
        at: of :class:`Recorder`.
        **choices: further ones of ``build_train_runner``.
    """
    config = Config(config.copy().to_dict())
    config.work_dir = str(work_dir)
    with one_thread():
        runner = engine.build_train_runner(config, resume=resume, **choices)
        recorder = Recorder(at)
        runner.register_hook(recorder)
        runner.train()
    return recorder.losses


@contextlib.contextmanager
def one_thread():
    """PyTorch computes on one thread: sums of several may differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fork(function, world_size: int = 1, timeout: float = 300) -> list[int]:
    """Run ``function(rank)`` in processes over gloo; their exit codes (negative: the signal).

    They are copies of this process, which spares them its imports. The limit is for those that
    hang: on a busy machine four iterations of two processes can take a minute.
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
        except SystemExit as leaving:
            code = leaving.code
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


def train_two(config: Config, work_dir: Path, at=None, rank_of_at=None, **choices) -> list[int]:
    """Exit codes of two processes that train together; :func:`losses_of` has their losses.

    Args:
        config, work_dir, at, **choices: as of :func:`train`.
        rank_of_at: the process that ``at`` is for; None for both.
    """

    def one(rank):
        own = at if rank_of_at in (None, rank) else None
        losses = train(config, work_dir, launcher="pytorch", at=own, **choices)
        Path(work_dir, f"losses-{rank}.json").write_text(json.dumps(losses))

    return fork(one, world_size=2)


def losses_of(work_dir: Path, rank: int) -> dict:
    """Losses by iteration of one process of :func:`train_two`."""
    content = json.loads(Path(work_dir, f"losses-{rank}.json").read_text())
    return {int(iteration): loss for iteration, loss in content.items()}


def equal(first: dict, second: dict) -> bool:
    """Whether two runs had the very same losses in the iterations of ``second``."""
    shared = [first[iteration] for iteration in second]
    return bool(second) and np.array_equal(shared, list(second.values()))


def same(first, second) -> bool:
    """Whether nested containers hold the same values, bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def assert_same_state(first: Path, second: Path) -> None:
    """Two checkpoints hold the same, bit for bit, but for times, logs and paths."""
    contents = []
    for path in (first, second):
        content = torch.load(path, map_location="cpu", weights_only=False)
        for key in ("time", "cfg", "experiment_name"):
            content["meta"].pop(key)
        scores = content.pop("message_hub")["runtime_info"]
        content["scores"] = {key: scores[key] for key in scores if "score" in key}
        contents.append(content)
    left, right = contents
    assert left.keys() == right.keys()
    assert [key for key in left if not same(left[key], right[key])] == []
