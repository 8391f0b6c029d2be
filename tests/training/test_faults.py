# SPDX-License-Identifier: Apache-2.0
"""Damaged files, losses that are not finite and images without objects."""

import copy
import json
import logging
import shutil
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny
import torch
from launches import Launches
from mmengine.hooks import RuntimeInfoHook
from mmengine.registry import init_default_scope
from mmengine.runner import get_priority
from mmengine.structures import BaseDataElement

from mmeformer.errors import TrainingError
from mmeformer.training import engine
from mmeformer.training.data import UNREADABLE, UnreadableFileError
from mmeformer.training.hooks import LossCheckHook, UnreadableFilesHook, _samples, on_host
from mmeformer.training.runner import Runner

IMAGES = {
    "detection": "coco/train2017",
    "segmentation": "masks/images/training",
    "rotated": "aerial/train/images",
}


@pytest.fixture
def folder(tiny_copy):
    return tiny_copy


def vanish(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def replace(path):
    path.write_text("<html>404</html>")


def run_with_late_damage(config, work_dir, damage, launcher="none"):
    """Damage files after the data set was listed and checked; (losses, hook)."""
    config.work_dir = str(work_dir)
    runner = engine.build_train_runner(config, launcher=launcher)
    recorder = tiny.Recorder()
    runner.register_hook(recorder)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    damage()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, UnreadableFilesHook))
    runner.train()
    return recorder.losses, hook


@pytest.mark.parametrize(
    ("task", "workers", "damage", "reason"),
    [
        pytest.param("detection", 2, cut, "is truncated", marks=pytest.mark.slow),
        ("segmentation", 0, vanish, "does not exist"),
        pytest.param("segmentation", 2, replace, "is not an image", marks=pytest.mark.slow),
        pytest.param("detection", 0, replace, "is not an image", marks=pytest.mark.slow),
        pytest.param("rotated", 0, cut, "is truncated", marks=pytest.mark.slow),
    ],
)
def test_one_damaged_file_is_left_out(folder, tmp_path, task, workers, damage, reason):
    config = tiny.TASKS[task](folder, iterations=4)
    config.train_dataloader.num_workers = workers
    bad = folder / IMAGES[task] / "000003.png"
    losses, hook = run_with_late_damage(config, tmp_path, lambda: damage(bad))
    # All 8 images were drawn once; each step had its two.
    assert len(losses) == 4
    assert list(hook.found) == [str(bad)] and reason in hook.found[str(bad)]
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert f"left out of training: {bad}" in log
    assert "1 of 8 samples could not be read so far" in log


def wrapped(task, kind, dataset):
    """A training set of `task` inside a wrapper."""
    if kind == "ConcatDataset":
        half = [copy.deepcopy(dataset) for _ in range(2)]
        for index, part in enumerate(half):
            part.indices = list(range(4 * index, 4 * index + 4))
        return dict(type=kind, datasets=half)
    if kind == "RepeatDataset":
        return dict(
            type=kind,
            dataset=dict(type="ClassBalancedDataset", dataset=dataset, oversample_thr=1e-3),
            times=3,
        )
    pipeline = list(dataset.pipeline)
    dataset.pipeline = pipeline[:2]
    mosaic = dict(type="RandomMosaic", prob=1.0, img_scale=(64, 64))
    return dict(type=kind, dataset=dataset, pipeline=[mosaic, *pipeline[2:]])


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("segmentation", "MultiImageMixDataset"),
        *(
            pytest.param(task, kind, marks=pytest.mark.slow)
            for task, kind in (
                ("segmentation", "ConcatDataset"),
                ("detection", "ConcatDataset"),
                ("detection", "RepeatDataset"),
                ("rotated", "ConcatDataset"),
                ("rotated", "RepeatDataset"),
            )
        ),
    ],
)
def test_damaged_file_inside_a_wrapper_is_left_out(folder, tmp_path, task, kind):
    config = tiny.TASKS[task](folder, iterations=8)
    loader = config.train_dataloader
    loader.dataset = wrapped(task, kind, loader.dataset)
    bad = folder / IMAGES[task] / "000003.png"
    losses, hook = run_with_late_damage(config, tmp_path, lambda: vanish(bad))
    assert len(losses) == 8
    assert hook.found == {str(bad): "does not exist"}
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "1 of 8 samples could not be read so far" in log


@pytest.mark.slow
def test_damaged_file_inside_a_mosaic_of_boxes(folder, tmp_path):
    """mmdet's mosaic has no masks, so there is no model here that could train on it."""
    config = tiny.detection(folder)
    dataset = config.train_dataloader.dataset
    dataset.pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    mosaic = [dict(type="Mosaic", img_scale=(64, 64)), dict(type="PackDetInputs")]
    config.train_dataloader.dataset = dict(
        type="MultiImageMixDataset", dataset=dataset, pipeline=mosaic
    )
    config.work_dir = str(tmp_path)
    loop = engine.build_train_runner(config).train_loop
    bad = folder / IMAGES["detection"] / "000003.png"
    vanish(bad)
    found = {}
    for _, batch in zip(range(8), loop.dataloader, strict=False):
        for sample in batch["data_samples"]:
            found.update(sample.metainfo.get(UNREADABLE, {}))
    assert found == {str(bad): "does not exist"}


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[pytest.mark.slow] * (task != "segmentation")) for task in IMAGES],
)
@pytest.mark.parametrize("command", ["val", pytest.param("test", marks=pytest.mark.slow)])
def test_evaluation_inside_a_wrapper_needs_all_its_files(folder, tmp_path, task, command):
    """Whatever the data set calls itself: the loader decides."""
    config = tiny.TASKS[task](folder)
    dataset = config[f"{command}_dataloader"].dataset
    config[f"{command}_dataloader"].dataset = dict(type="ConcatDataset", datasets=[dataset])
    config.work_dir = str(tmp_path)
    runner = engine.build_train_runner(config)
    loop = getattr(runner, f"build_{command}_loop")(getattr(runner, f"_{command}_loop"))
    bad = next(folder.glob(f"{IMAGES[task].split('/')[0]}/**/val*/**/000001.png"))
    vanish(bad)
    with pytest.raises(UnreadableFileError, match="000001.png does not exist"):
        list(loop.dataloader)


def test_too_many_stop_the_run(folder, tmp_path):
    config = tiny.segmentation(folder)
    bad = [folder / IMAGES["segmentation"] / f"00000{index}.png" for index in (1, 4, 6)]
    with pytest.raises(TrainingError, match="of 8 samples could not .* the 1 that max_share=0.01"):
        run_with_late_damage(config, tmp_path, lambda: [vanish(path) for path in bad])


@pytest.mark.slow
def test_share_is_the_users(folder, tmp_path):
    config = tiny.segmentation(folder, iterations=4)
    config.custom_hooks.append(dict(type="mmeformer.UnreadableFilesHook", max_share=0.5))
    bad = [folder / IMAGES["segmentation"] / f"00000{index}.png" for index in (1, 4, 6)]
    _, hook = run_with_late_damage(config, tmp_path, lambda: [vanish(path) for path in bad])
    assert sorted(hook.found) == [str(path) for path in bad]


@pytest.mark.slow
def test_vanished_folder_is_told_from_single_files(folder, tmp_path):
    config = tiny.segmentation(folder)
    config.custom_hooks.append(dict(type="mmeformer.UnreadableFilesHook", max_share=1))
    with pytest.raises(TrainingError, match="8 samples in a row .* the disk with the data"):
        run_with_late_damage(
            config, tmp_path, lambda: shutil.rmtree(folder / IMAGES["segmentation"])
        )


@pytest.mark.slow
def test_validation_needs_all_its_files(folder, tmp_path):
    config = tiny.segmentation(folder, iterations=2)
    config.train_cfg.val_interval = 2
    config.work_dir = str(tmp_path)
    runner = engine.build_train_runner(config)
    runner._val_loop = runner.build_val_loop(runner._val_loop)
    mask = folder / "masks/annotations/validation/000001.png"
    vanish(mask)
    with pytest.raises(UnreadableFileError, match=f"{mask} does not exist"):
        runner.train()
    assert (tmp_path / "iter_2.pth").is_file()


@pytest.mark.slow
def test_error_of_the_pipeline_is_not_blamed_on_the_file(folder, tmp_path):
    config = tiny.segmentation(folder)
    config.train_dataloader.dataset.pipeline[2] = dict(type="RandomCrop", crop_size=(-1, 4))
    with pytest.raises(AssertionError):
        run_with_late_damage(config, tmp_path, lambda: None)


@pytest.mark.forks
@pytest.mark.slow
def test_processes_put_their_findings_together(folder, tmp_path):
    config = tiny.segmentation(folder, iterations=8)
    config.custom_hooks.append(dict(type="mmeformer.UnreadableFilesHook", max_share=0.5))
    bad = [folder / IMAGES["segmentation"] / f"00000{index}.png" for index in range(4)]

    def one(rank):
        _, hook = run_with_late_damage(config, tmp_path / "work", lambda: None, "pytorch")
        (tmp_path / f"found-{rank}.json").write_text(json.dumps(sorted(hook.found)))

    for path in bad:
        path.write_bytes(b"")
    # The check at the start would stop this run.
    config.train_dataloader.dataset.type = "BaseSegDataset"
    config.train_dataloader.dataset.data_prefix = dict(
        img_path="images/training", seg_map_path="annotations/training"
    )
    assert tiny.fork(one, world_size=2) == [0, 0]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found == [str(path) for path in bad]


def spoil(runner_of):
    """Make the first weight of the head infinite."""
    parameter = next(runner_of().model.parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    "task",
    [
        pytest.param("detection", marks=pytest.mark.slow),
        "segmentation",
        pytest.param("rotated", marks=pytest.mark.slow),
    ],
)
def test_loss_that_is_not_finite(folder, tmp_path, task):
    config = tiny.TASKS[task](folder)
    config.work_dir = str(tmp_path)
    runner = engine.build_train_runner(config)
    runner.register_hook(tiny.Recorder(at={3: lambda: spoil(lambda: runner)}))
    with pytest.raises(TrainingError) as error:
        runner.train()
    text = str(error.value)
    assert text.startswith("iteration 4: the loss is not finite (loss nan, ")
    assert any(f"loss_{name} nan" in text for name in ("cls", "ce", "bbox"))
    assert text.count(".png") == 2 and str(folder / IMAGES[task]) in text
    assert f"The last good checkpoint is {tmp_path / 'iter_2.pth'}." in text
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]


@pytest.mark.forks
@pytest.mark.slow
def test_loss_of_another_process_is_not_finite(folder, tmp_path):
    config = tiny.segmentation(folder)

    def one(rank):
        config.work_dir = str(tmp_path / "work")
        runner = engine.build_train_runner(config, launcher="pytorch")
        at = {3: lambda: spoil(lambda: runner)} if rank == 1 else {}
        runner.register_hook(tiny.Recorder(at))
        with pytest.raises(TrainingError) as error:
            runner.train()
        (tmp_path / f"error-{rank}.txt").write_text(str(error.value))

    assert tiny.fork(one, world_size=2) == [0, 0]
    assert "loss of another process" in (tmp_path / "error-0.txt").read_text()
    assert "loss_ce nan" in (tmp_path / "error-1.txt").read_text()
    assert [path.name for path in tmp_path.glob("work/*.pth")] == ["iter_2.pth"]


def test_loss_that_stays_zero(folder, tmp_path, monkeypatch):
    """One class, unlabeled pixels, and none of our checks of the data."""
    monkeypatch.setattr(LossCheckHook, "PATIENCE", 3)
    config = tiny.segmentation(folder)
    config.train_dataloader.dataset.update(
        type="BaseSegDataset",
        metainfo=dict(classes=("blob",), palette=[[0, 0, 0]]),
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    )
    config.model.decode_head.num_classes = 1
    config.custom_hooks = []
    for path in (folder / "masks/annotations/training").glob("*.png"):
        cv2.imwrite(str(path), np.minimum(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 1))
    with pytest.raises(
        TrainingError, match=r"iteration 3: the loss was exactly 0 in 3 .*loss_ce 0"
    ):
        tiny.train(config, tmp_path)


@pytest.mark.parametrize("task", tiny.all_tasks(*tiny.ALL_TASKS))
def test_loss_that_becomes_zero(folder, tmp_path, monkeypatch, task):
    monkeypatch.setattr(LossCheckHook, "PATIENCE", 2)
    config = tiny.ALL_TASKS[task](folder)

    def weightless(settings):
        for key, value in settings.items():
            if isinstance(value, dict):
                if "loss" in key:
                    value["loss_weight"] = 0.0
                weightless(value)

    weightless(config.model)
    with pytest.raises(TrainingError, match="iteration 2: the loss was exactly 0 in 2 iterations"):
        tiny.train(config, tmp_path)


def test_zeros_must_be_in_a_row(monkeypatch, caplog):
    monkeypatch.setattr(LossCheckHook, "PATIENCE", 2)
    runner = SimpleNamespace(iter=0, work_dir="none", logger=logging.getLogger("zeros"))
    hook = LossCheckHook()
    for cls, bbox in ((0, 0), (1, 0), (0, 0.5), (1, 0), (1, 0), (1, 0)):
        terms = dict(loss=torch.tensor(cls + bbox), loss_cls=torch.tensor(cls), loss_bbox=bbox)
        hook.after_train_iter(runner, 0, outputs=terms)
    assert caplog.text.count("loss_bbox was exactly 0 in 2 iterations") == 2
    assert "loss_cls" not in caplog.text
    hook.after_train_iter(runner, 0, outputs=dict(loss=0.0, acc=3))
    with pytest.raises(TrainingError, match="loss 0"):
        hook.after_train_iter(runner, 0, outputs=dict(loss=0.0, acc=3))


def test_the_host_waits_once_for_all_losses():
    names = [f"loss_{number}" for number in range(8)]
    outputs = {name: torch.rand(1 + number % 2).sum() for number, name in enumerate(names)}
    expected = {name: value.item() for name, value in outputs.items()}
    outputs.update(acc=torch.tensor([3]), stage="rpn", map=torch.ones(2))
    with Launches() as launches:
        read = on_host(outputs)
    assert launches.waits == {"cpu": 1}
    assert {name: value.item() for name, value in read.items()} == expected | dict(acc=3)
    assert on_host(dict(loss=1.0)) == {}
    # Later hooks find them read.
    runner = SimpleNamespace(iter=0, work_dir="none", logger=logging.getLogger("once"))
    LossCheckHook().after_train_iter(runner, 0, outputs=outputs)
    assert {name: outputs[name].item() for name in names} == expected
    assert get_priority(LossCheckHook.priority) < get_priority(RuntimeInfoHook.priority)


@pytest.mark.slow
def test_nonfinite_weights_are_not_saved(folder, tmp_path, monkeypatch):
    """A gradient may be infinite though the loss is not."""
    monkeypatch.setattr(LossCheckHook, "after_train_iter", lambda *args, **kwargs: None)
    config = tiny.segmentation(folder)
    config.work_dir = str(tmp_path)
    runner = engine.build_train_runner(config)
    runner.register_hook(tiny.Recorder(at={3: lambda: spoil(lambda: runner)}))
    with pytest.raises(TrainingError, match="weights are NaN .*last good checkpoint is .*iter_2"):
        runner.train()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]


def test_detection_without_objects(folder, tmp_path):
    path = folder / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    # All objects are in the first image: most batches have none at all.
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] == 0]
    path.write_text(json.dumps(content))
    config = tiny.detection(folder, iterations=4)
    config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    losses = tiny.train(config, tmp_path)
    assert len(losses) == 4 and np.isfinite(list(losses.values())).all()


@pytest.mark.slow
def test_rotated_without_objects(folder, tmp_path):
    for path in (folder / "aerial/train/annfiles").glob("*.txt"):
        if path.stem != "000000":
            path.write_text("")
    losses = tiny.train(tiny.rotated(folder, iterations=4), tmp_path)
    assert len(losses) == 4 and np.isfinite(list(losses.values())).all()


@pytest.mark.slow
def test_segmentation_without_labels(folder, tmp_path):
    for path in (folder / "masks/annotations/training").glob("*.png"):
        if path.stem != "000000":
            cv2.imwrite(str(path), np.full((64, 64), 255, np.uint8))
    config = tiny.segmentation(folder, iterations=4)
    config.model.decode_head.loss_decode.avg_non_ignore = True
    losses = tiny.train(config, tmp_path)
    assert len(losses) == 4 and np.isfinite(list(losses.values())).all()


def test_runs_of_the_same_second_are_apart(folder, tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    runners = []
    for build in (tiny.segmentation, tiny.detection):
        config = build(folder)
        config.work_dir = str(tmp_path / build.__name__)
        runners.append(engine.build_train_runner(config))
    one, two = (runner.timestamp for runner in runners)
    assert one != two and one[:15] == two[:15]
    assert [runner.default_scope.scope_name for runner in runners] == ["mmseg", "mmdet"]
    assert runners[0].message_hub is not runners[1].message_hub


def test_samples_of_a_batch_however_nested():
    one, two = BaseDataElement(metainfo=dict(a=1)), BaseDataElement(metainfo=dict(a=2))
    batch = dict(inputs=[1], data_samples=[one, [two]])
    assert [sample.a for sample in _samples(batch)] == [1, 2]
    assert list(_samples(None)) == []


@pytest.mark.parametrize(
    ("sampler", "enough"), [("DefaultSampler", False), ("InfiniteSampler", True)]
)
def test_batch_larger_than_the_data(folder, sampler, enough):
    """With ``drop_last`` an epoch has no iteration; an endless sampler repeats the images."""
    loader = tiny.segmentation(folder).train_dataloader
    loader.update(batch_size=9, drop_last=True, sampler=dict(type=sampler, shuffle=True))
    init_default_scope("mmseg")
    if enough:
        assert len(next(iter(Runner.build_dataloader(loader)))["inputs"]) == 9
    else:
        with pytest.raises(TrainingError, match="batch_size=9 .* leaves out all 8 samples"):
            Runner.build_dataloader(loader)


def test_loader_without_workers_needs_no_other_setting(folder):
    loader = tiny.segmentation(folder).train_dataloader
    init_default_scope("mmseg")
    loader.update(num_workers=0, persistent_workers=True, prefetch_factor=4)
    assert not Runner.build_dataloader(loader, seed=0).persistent_workers
    loader.update(num_workers=1)
    assert Runner.build_dataloader(loader, seed=0).persistent_workers


def test_share_must_be_a_share():
    with pytest.raises(ValueError, match="between 0 and 1, but is 5"):
        UnreadableFilesHook(max_share=5)
