# SPDX-License-Identifier: Apache-2.0
"""The network's input is that of the config's own test pipeline, or the export is refused."""

import numpy as np
import pytest
import torch
from tiny import exported, small_config

from mmeformer import runtime
from mmeformer.deploy import check, inputs, models
from mmeformer.deploy.metadata import export_metadata


def metadata_of(config):
    task = {"mmdet": "detection", "mmseg": "segmentation", "mmrotate": "rotated"}
    model = models.build_model(config)
    return model, export_metadata(config, model, task[config.default_scope])


def steps_of(config):
    return {
        step["type"].rpartition(".")[2]: step for step in config.test_dataloader.dataset.pipeline
    }


@pytest.mark.parametrize(
    "step, setting",
    [
        ("LoadImageFromFile", dict(color_type="grayscale")),
        ("LoadImageFromFile", dict(imdecode_backend="pillow")),
        ("LoadImageFromFile", dict(to_float32=True)),
        ("Resize", dict(backend="pillow")),
        ("Resize", dict(interpolation="area")),
        ("Resize", dict(scale_factor=0.5)),
        ("Resize", dict(of_the_future=1)),
    ],
)
@pytest.mark.parametrize("task", ["detection", "segmentation", "rotated"])
def test_settings_of_steps_that_change_pixels_are_refused(task, step, setting):
    config = small_config(task)
    if step not in steps_of(config):
        config.test_dataloader.dataset.pipeline.insert(
            1, dict(type="Resize", scale=(64, 64), keep_ratio=True)
        )
    steps_of(config)[step].update(setting)
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"step {step} of the test pipeline has {name}={value!r}"):
        metadata_of(config)


@pytest.mark.parametrize(
    "task, setting",
    [
        ("detection", dict(pad_value=114)),
        ("rotated", dict(pad_value=114)),
        ("segmentation", dict(test_cfg=dict(size_divisor=32))),
        ("segmentation", dict(test_cfg=dict(size=(128, 128)))),
    ],
)
def test_settings_of_the_preprocessor_that_change_pixels_are_refused(task, setting):
    config = small_config(task)
    config.model.data_preprocessor.update(setting)
    with pytest.raises(ValueError, match=f"model.data_preprocessor has {next(iter(setting))}="):
        metadata_of(config)


@pytest.mark.parametrize("kind", ["LoadImageFromNDArray", "LoadMultiChannelImageFromFiles"])
def test_other_loaders_are_refused(kind):
    config = small_config("detection")
    steps_of(config)["LoadImageFromFile"].type = kind
    with pytest.raises(ValueError, match=f"step {kind} of the test pipeline"):
        metadata_of(config)


def test_a_wrapped_data_set_is_named():
    config = small_config("detection")
    config.test_dataloader.dataset = dict(
        type="ConcatDataset", datasets=[config.test_dataloader.dataset]
    )
    with pytest.raises(ValueError, match="a ConcatDataset without a pipeline"):
        inputs.pipeline_settings(config)


@pytest.mark.parametrize("task", ["detection", "segmentation", "rotated"])
@pytest.mark.parametrize(
    "setting",
    [
        dict(mean=None, std=None, bgr_to_rgb=False),
        dict(mean=[100.0], std=[50.0], bgr_to_rgb=False, rgb_to_bgr=True),
    ],
)
def test_normalization_in_every_spelling(task, setting, picture):
    config = small_config(task)
    config.model.data_preprocessor.update(setting)
    model, metadata = metadata_of(config)
    assert len(metadata.mean) == len(metadata.std) == 3
    comparison = check.Comparison()
    inputs.compare_inputs(config, model.data_preprocessor, metadata, [picture], comparison)
    inputs.compare_inputs(config, model.data_preprocessor, metadata, [], comparison)
    assert len(comparison.lines) == 2 and not comparison.failures, comparison.lines


def test_the_check_sees_another_input(trained, picture, tmp_path, monkeypatch):
    """A setting that the lists do not know is found by its effect."""
    monkeypatch.setitem(inputs._STEPS["Resize"], "interpolation", None)
    small = trained("detection")
    steps_of(small.config)["Resize"].interpolation = "nearest"
    with pytest.raises(check.CheckFailed, match="shapes.png: the prepared image differs by"):
        exported(small, picture, folder=tmp_path, size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_export_without_normalization(trained, picture, tmp_path):
    small = trained("segmentation")
    small.config.model.data_preprocessor.update(mean=None, std=None)
    for preprocessing in (True, False):
        lines = []
        exported(small, picture, "m.onnx", lines, tmp_path, preprocessing=preprocessing)
        assert any("0 of" in line and "another class" in line for line in lines), lines


def test_no_limit_of_detections(trained, picture, tmp_path):
    """mmdet keeps all objects with ``max_per_img=-1``, and so does the file."""
    small = trained("detection")
    small.config.model.test_cfg.rcnn.update(max_per_img=-1, score_thr=0.02)
    lines = []
    path = exported(small, picture, lines=lines, folder=tmp_path)
    assert runtime.load(path).metadata.max_per_image is None
    limit = trained("detection").config.model.test_cfg.rcnn.max_per_img
    assert len(runtime.load(path).predict(picture).boxes) > limit
    assert any("detections match" in line for line in lines)


@pytest.mark.parametrize("task, part", [("detection", "rpn"), ("rotated", None)])
def test_a_missing_limit_that_mmdet_misreads(trained, picture, tmp_path, task, part):
    """There mmdet takes ``[:-1]``, which loses the worst."""
    small = trained(task)
    settings = small.config.model.test_cfg
    (settings[part] if part else settings).max_per_img = -1
    with pytest.raises(ValueError, match="max_per_img is -1, with which mmdet loses the worst"):
        exported(small, picture, folder=tmp_path)


def test_all_candidates_without_nms_pre(trained, picture, tmp_path):
    small = trained("rotated")
    small.config.model.test_cfg.pop("nms_pre")
    lines = []
    exported(small, picture, lines=lines, folder=tmp_path)
    assert any("detections match" in line for line in lines)


@pytest.mark.parametrize(
    "size, advice", [((100, 100), "96 96 or 128 128"), ((33, 64), "32 64 or 64 64")]
)
def test_sizes_that_the_pipeline_cannot_make(trained, picture, tmp_path, size, advice):
    small = trained("segmentation")
    small.config.test_dataloader.dataset.pipeline.insert(
        1, dict(type="ResizeToMultiple", size_divisor=32)
    )
    message = f"--size {size[0]} {size[1]}: .* multiples of 32 .*; give --size {advice}"
    with pytest.raises(ValueError, match=message):
        exported(small, picture, folder=tmp_path, size=size)


def test_a_detector_of_any_size(trained, picture, tmp_path):
    """It pads; no step of its pipeline makes multiples."""
    path = exported(trained("detection"), picture, folder=tmp_path, size=(100, 70))
    assert runtime.load(path).predict(picture).boxes.shape[1] == 4


def test_top_k_without_a_limit():
    from mmeformer.deploy.graphs import top_k

    scores = torch.tensor([[0.1, 0.7, 0.4]])
    for limit in (-1, 0, 5):
        values, index = top_k(scores, limit)
        assert index.tolist() == [[1, 2, 0]]
        np.testing.assert_allclose(values, [[0.7, 0.4, 0.1]])
