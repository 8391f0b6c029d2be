# SPDX-License-Identifier: Apache-2.0
"""Damaged files of twelve kinds among many: training finishes as if they were not there."""

import copy
import json
import os

import cv2
import numpy as np
import pytest
import tiny
from mmengine.registry import init_default_scope

from mmeformer.synthetic.masks import write_mask_dataset
from mmeformer.synthetic.shapes import write_coco_dataset
from mmeformer.training import engine
from mmeformer.training.data import UNREADABLE, GuardedDataset, UnreadableFileError
from mmeformer.training.hooks import UnreadableFilesHook


def rewrite(change):
    """Damage that changes the bytes of a file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def replaced(make):
    """Damage that puts something else in the place of a file."""

    def damage(path):
        path.unlink()
        make(path)

    return damage


def noise(data):
    return np.random.default_rng(0).integers(0, 256, len(data), np.uint8).tobytes()


def spoil_pixels(data):
    """Change bytes in the middle of the compressed pixels."""
    middle = data.index(b"IDAT") + 40
    return data[:middle] + bytes(b ^ 0x55 for b in data[middle : middle + 24]) + data[middle + 24 :]


def huge(data):
    """The header of a picture of 30,000 x 30,000 pixels."""
    place = data.index(b"IHDR") + 4
    return data[:place] + (30000).to_bytes(4, "big") * 2 + data[place + 8 :]


DAMAGES = {
    "empty": rewrite(lambda data: b""),
    "cut in half": rewrite(lambda data: data[: len(data) // 2]),
    "last bytes missing": rewrite(lambda data: data[:-20]),
    "web page": rewrite(lambda data: b"<html>404</html>"),
    "Git LFS pointer": rewrite(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
    "zeros": rewrite(lambda data: bytes(len(data))),
    "noise": rewrite(noise),
    "spoiled pixels": rewrite(spoil_pixels),
    "huge header": rewrite(huge),
    "missing": replaced(lambda path: None),
    "broken link": replaced(lambda path: path.symlink_to("nowhere.png")),
    "pipe": replaced(os.mkfifo),
}
assert len(DAMAGES) == 12


def training(folder, wrapped, share, size):
    """One epoch over ``size`` images, inside wrappers or not, and a validation."""
    config = tiny.segmentation(folder, iterations=size // 8)
    loader = config.train_dataloader
    config.train_cfg.val_interval = size // 8
    config.default_hooks.checkpoint.interval = size
    for each in (loader, config.val_dataloader):
        each.dataset.data_root = str(folder / "large")
    loader.batch_size = 8
    config.custom_hooks.append(dict(type="mmeformer.UnreadableFilesHook", max_share=share))
    if wrapped:
        halves = [copy.deepcopy(loader.dataset) for _ in range(2)]
        for half, numbers in zip(halves, (range(size // 2), range(size // 2, size)), strict=True):
            half.indices = list(numbers)
        repeated = [dict(type="RepeatDataset", dataset=half, times=1) for half in halves]
        loader.dataset = dict(type="ConcatDataset", datasets=repeated)
    return config


def nested(folder, size):
    """One epoch of boxes over ``size`` images inside all wrappers at once, and a validation."""
    root = folder / "large"
    config = tiny.boxes_only(folder, iterations=size // 8)
    config.train_cfg.val_interval = size // 8
    config.default_hooks.checkpoint.interval = size
    loader = config.train_dataloader
    for each in (loader, config.val_dataloader):
        each.dataset.data_root = str(root)
    config.val_evaluator.ann_file = str(root / "annotations/instances_val2017.json")
    loader.batch_size = 8
    load, transform = loader.dataset.pipeline[:2], loader.dataset.pipeline[2:]
    loader.dataset.pipeline = load
    halves = [copy.deepcopy(loader.dataset) for _ in range(2)]
    for half, numbers in zip(halves, (range(size // 2), range(size // 2, size)), strict=True):
        half.indices = list(numbers)
    balanced = [
        dict(type="ClassBalancedDataset", dataset=half, oversample_thr=1e-3) for half in halves
    ]
    joined = dict(type="ConcatDataset", datasets=balanced)
    loader.dataset = dict(
        type="MultiImageMixDataset",
        dataset=dict(type="RepeatDataset", dataset=joined, times=2),
        pipeline=[dict(type="Mosaic", img_scale=(64, 64)), *transform],
    )
    return config


def run(config, work_dir, damage):
    """Train; files are damaged after they were listed. (losses, scores, files left out, log)"""
    config.work_dir = str(work_dir)
    runner = engine.build_train_runner(config)
    recorder = tiny.Recorder()
    runner.register_hook(recorder)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    damage()
    runner.train()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, UnreadableFilesHook))
    (rows,) = work_dir.glob("*/vis_data/scalars.json")
    (*_, last) = map(json.loads, rows.read_text().splitlines())
    scores = {name: last[name] for name in last if "mIoU" in name or "bbox_mAP" in name}
    assert scores
    (log,) = work_dir.glob("*/*.log")
    return recorder.losses, scores, hook.found, log.read_text()


@pytest.mark.parametrize(
    ("size", "count", "share", "wrapped"),
    [
        (60, 12, 0.3, True),
        pytest.param(200, 12, 0.1, False, marks=pytest.mark.slow),
        # One in a hundred, which is allowed without a setting.
        pytest.param(2000, 20, 0.01, True, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_without_the_damaged_files(tmp_path, size, count, share, wrapped):
    root = write_mask_dataset(tmp_path / "large", train=size, val=4, size=64)
    config = training(tmp_path, wrapped, share, size)
    assert_same_without_damaged(config, tmp_path, root / "images/training", size, count)


@pytest.mark.slow
def test_mosaics_of_nested_data_sets_are_those_without_the_damaged_files(tmp_path):
    """Each sample is made of four images, of which any may be replaced."""
    root = write_coco_dataset(tmp_path / "large", train=2000, val=4, size=64)
    config = nested(tmp_path, 2000)
    assert_same_without_damaged(config, tmp_path, root / "train2017", 2000, 20)


def assert_same_without_damaged(config, folder, images, size, count):
    """Train with damaged images, and on the same data without them."""
    kinds = list(DAMAGES)
    bad = {
        images / f"{number:06d}.png": kinds[index % 12]
        for index, number in enumerate(range(3, size, size // count)[:count])
    }
    before = {path: path.read_bytes() for path in bad}

    def damage():
        for path, kind in bad.items():
            DAMAGES[kind](path)

    def remove():
        for path in bad:
            path.unlink(missing_ok=True)

    losses, score, found, log = run(copy.deepcopy(config), folder / "damaged", damage)
    assert len(losses) == size // 8 and np.isfinite(list(losses.values())).all()
    assert sorted(found) == sorted(map(str, bad))
    for path in bad:
        assert log.count(f"left out of training: {path} ") == 1
    assert f"{count} of {size} samples could not be read so far" in log
    remove()
    for path, data in before.items():
        path.write_bytes(data)
    # The same data without these files, whatever was in their places.
    absent, same_score, _, _ = run(copy.deepcopy(config), folder / "absent", remove)
    assert tiny.equal(losses, absent) and score == same_score


def test_an_image_too_thin_to_be_resized_is_named(tmp_path):
    data = tiny.detection(tmp_path).train_dataloader.dataset
    data.pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(64, 64), keep_ratio=True),
        dict(type="PackDetInputs"),
    ]
    init_default_scope("mmdet")
    thin, *_ = sorted((tmp_path / "coco/train2017").iterdir())
    cv2.imwrite(str(thin), np.zeros((1, 300, 3), np.uint8))
    labels = tmp_path / "coco" / data.ann_file
    content = json.loads(labels.read_text())
    next(item for item in content["images"] if item["file_name"] == thin.name).update(
        width=300, height=1
    )
    for annotation in content["annotations"]:
        annotation["bbox"] = [0, 0, 9, 1]
    labels.write_text(json.dumps(content))
    reason = "is too thin: a side would be resized to 0 px"
    found = GuardedDataset(data)[0]["data_samples"].metainfo[UNREADABLE]
    assert found == {str(thin): reason}
    with pytest.raises(UnreadableFileError, match=f"{thin.name} {reason}"):
        GuardedDataset(data, evaluation=True)[0]


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_seen_without_decoding_more(tmp_path, kind):
    from mmeformer.checks.images import decode_fault

    path = tmp_path / "picture.png"
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    assert cv2.imwrite(str(path), picture)
    assert decode_fault(str(path)) is None
    DAMAGES[kind](path)
    assert decode_fault(str(path))
