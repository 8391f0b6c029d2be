# SPDX-License-Identifier: Apache-2.0
"""Patches keep their scale in tests and prediction; whole images are resized as in training."""

import copy
import warnings

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.registry import init_default_scope

from mmeformer import configs, load
from mmeformer.inference import load_predictor
from mmeformer.registry import DATASETS
from mmeformer.rotated.inference import detect_large_image
from mmeformer.training import engine
from mmeformer.training_images import KEY, TrainingImages
from mmeformer.windows import FILL

LABEL = "2 2 20 2 20 12 2 12 ship 0\n"
RESIZE = dict(type="mmdet.Resize", scale=(128, 128), keep_ratio=True)
PIPELINE = [
    dict(type="LoadImageFromFile"),
    RESIZE,
    dict(type="mmdet.PackDetInputs", meta_keys=("img_shape", "ori_shape", "scale_factor")),
]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def folder(root, sizes):
    """Images of the sizes, by name, each with one ship."""
    for kind in ("images", "annfiles"):
        (root / kind).mkdir(parents=True)
    for name, size in sizes.items():
        cv2.imwrite(str(root / "images" / f"{name}.png"), noise(*size))
        (root / "annfiles" / f"{name}.txt").write_text(LABEL)
    return root


def dataset(root, **options):
    init_default_scope("mmrotate")
    return DATASETS.build(
        dict(
            type="mmeformer.DOTADataset",
            data_root=str(root),
            ann_file="annfiles/",
            data_prefix=dict(img_path="images/"),
            metainfo=dict(classes=("ship",)),
            pipeline=copy.deepcopy(PIPELINE),
            test_mode=True,
            **options,
        )
    )


@pytest.mark.parametrize(
    ("sizes", "patch_size", "expected"),
    [
        ({"a__128__0___0": (128, 128), "b__128__0___0": (50, 60)}, None, ((128, 128), 128)),
        ({"a__64__0___0": (64, 64), "b__128__0___0": (128, 128)}, None, ((64, 128), 128)),
        ({"a": (96, 96), "b": (96, 40)}, None, ((96, 96), 96)),
        ({"a": (96, 96), "b": (200, 40)}, None, ((96, 200), 0)),
        ({"a__128__0___0": (128, 128), "b": (200, 40)}, None, ((128, 200), 0)),
        ({"a": (96, 96), "b": (200, 40)}, 200, ((96, 200), 200)),
        ({"a__128__0___0": (128, 128)}, 0, ((128, 128), 0)),
    ],
    ids=["named", "rates", "one size", "mixed", "some named", "set", "set to whole"],
)
def test_kind_of_a_data_set(tmp_path, sizes, patch_size, expected):
    found = dataset(folder(tmp_path, sizes), patch_size=patch_size).training_images()
    assert found == TrainingImages(*expected)


def test_small_patches_are_padded_not_enlarged(tmp_path):
    root = folder(tmp_path, {"a__128__0___0": (40, 30), "b__64__0___0": (64, 64)})
    first, second = (dataset(root)[index] for index in range(2))
    pixels = first["inputs"].numpy().transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels[:30, :40], noise(40, 30))
    assert pixels.shape == (128, 128, 3) and (pixels[30:] == FILL).all()
    assert first["data_samples"].ori_shape == (30, 40)
    assert first["data_samples"].scale_factor == (1, 1)
    # A patch of rate 2 is enlarged as in training.
    assert second["data_samples"].scale_factor == (2, 2)
    whole = dataset(root, patch_size=0)[0]
    assert whole["data_samples"].scale_factor == (3.2, 3.2)


def test_a_large_image_among_patches_is_named(tmp_path):
    data = dataset(folder(tmp_path, {"a": (300, 90)}), patch_size=128)
    with pytest.warns(UserWarning, match=r"a.png: objects appear at 0.43 times .* 300 px"):
        data[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset(folder(tmp_path / "whole", {"a": (300, 90), "b": (40, 40)}))[0]


def test_wrappers_are_of_one_kind():
    patches, whole = TrainingImages((64, 128), 128), TrainingImages((90, 300))
    assert TrainingImages.merged([patches, None]) == patches
    assert TrainingImages.merged([patches, whole]) == TrainingImages((64, 300))
    assert TrainingImages.merged([]) is None


@pytest.mark.parametrize(
    ("side", "text"),
    [(60, "1.7 times"), (70, None), (299, None), (301, "0.66 times"), (600, "0.33 times")],
)
def test_scale_warning(side, text):
    found = TrainingImages((100, 200)).scale_warning(side)
    assert found is None if text is None else text in found
    assert TrainingImages(None, 100).scale_warning(side) is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(kind)``: config and checkpoint of two iterations on patches or whole images."""
    made = {}

    def make(kind):
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            config = tiny.rotated(place, iterations=2)
            config.model.test_cfg.score_thr = 0.0
            sizes = {f"{i}": (64, 64) for i in range(4)}
            if kind == "whole":
                sizes = {"a": (64, 50), "b": (90, 90), "c": (200, 120), "d": (80, 80)}
            config.train_dataloader.dataset.update(
                data_root=str(folder(place / "data", sizes)),
                ann_file="annfiles/",
                data_prefix=dict(img_path="images/"),
                metainfo=config.test_dataloader.dataset.metainfo,
                pipeline=[
                    *config.train_dataloader.dataset.pipeline[:3],
                    dict(RESIZE, clip_object_border=False),
                    *config.train_dataloader.dataset.pipeline[3:],
                ],
            )
            tiny.train(config, place / "work")
            made[kind] = config, str(place / "work" / "iter_2.pth")
        config, checkpoint = made[kind]
        return copy.deepcopy(config), checkpoint

    return make


def test_the_checkpoint_records_the_images(trained):
    for kind, record in (
        ("patches", dict(sides=(64, 64), patch_size=64)),
        ("whole", dict(sides=(64, 200), patch_size=0)),
    ):
        meta = torch.load(trained(kind)[1], weights_only=False)["meta"]
        assert meta["dataset_meta"][KEY] == record


def inputs_of(config, checkpoint, root):
    """Image shapes and scale factors as ``tools/test.py`` gives them to the model."""
    config.test_dataloader.dataset.update(
        data_root=str(root),
        ann_file="annfiles/",
        data_prefix=dict(img_path="images/"),
    )
    config.work_dir = str(root / "work")
    runner = engine.build_test_runner(config, checkpoint)
    runner.test()
    return [
        (tuple(sample["data_samples"].img_shape), sample["data_samples"].scale_factor[0])
        for sample in runner.test_dataloader.dataset
    ]


def test_a_test_follows_the_training(trained, tmp_path):
    root = folder(tmp_path, {"a": (32, 32), "b": (32, 20)})
    assert inputs_of(*trained("patches"), root) == [((128, 128), 2.0)] * 2
    assert inputs_of(*trained("whole"), root) == [((128, 128), 4.0), ((80, 128), 4.0)]


def test_prediction_on_patches_keeps_the_scale(trained):
    config, checkpoint = trained("patches")
    predictor = load_predictor(config, checkpoint, score_thr=0.0)
    assert predictor.window_size == 64 and not predictor.remarks
    image = noise(150, 40)
    assert predictor.window_of((64, 64)) is predictor.window_of((20, 30)) is None
    assert predictor.window_of(image.shape[:2]) == 64
    assert predictor.prepare(noise(30, 20))["data_samples"].scale_factor == (2.0, 2.0)
    cut = predictor.predict_windows(image, 64, 16)
    (found,) = predictor.predict_images([image])
    np.testing.assert_array_equal(found.boxes, cut.boxes)
    assert len(found) > 5
    model = predictor.model
    model.cfg = config
    large = detect_large_image(model, image)
    np.testing.assert_allclose(large.pred_instances.bboxes.tensor, cut.boxes, atol=1e-3)


def test_prediction_on_whole_images_is_that_of_a_test(trained):
    config, checkpoint = trained("whole")
    predictor = load_predictor(config, checkpoint, score_thr=0.0)
    for size in ((400, 300), (64, 50)):
        assert predictor.window_of(size[::-1]) is None
        sample = predictor.prepare(noise(*size))["data_samples"]
        assert sample.scale_factor == pytest.approx((128 / size[0],) * 2)
        (found,) = predictor.predict_images([noise(*size)])
        (expected,) = predictor.predict([predictor.prepare(noise(*size))])
        np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_scale_of_an_image_unlike_the_training_is_named(trained):
    predictor = load_predictor(*trained("whole"))
    assert "0.5 times" in predictor.scale_warning((400, 300), None)
    assert predictor.scale_warning((100, 100), None) is None
    predictor = load_predictor(*trained("patches"))
    assert predictor.scale_warning((400, 300), 64) is None
    assert predictor.scale_warning((10, 10), None) is None
    assert predictor.scale_warning((400, 300), 32) is None, "small windows are padded"
    assert "0.5 times" in predictor.scale_warning((400, 300), 128)
    assert "0.16 times" in predictor.scale_warning((400, 300), None), "--window 0"


def test_what_the_command_says_python_warns_of(trained, tmp_path):
    """As an exported file does: a scale unlike that of the training, and what was guessed."""
    config, checkpoint = trained("whole")
    config.dump(tmp_path / "config.py")
    model = load(checkpoint, config=tmp_path / "config.py", device="cpu")
    model(noise(100, 100))
    with pytest.warns(UserWarning, match="image of 400 x 300 px: objects appear at 0.5 times"):
        model([noise(100, 100), noise(400, 300)])
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(checkpoint, weights_only=False)["state_dict"], bare)
    with pytest.warns(UserWarning, match="does not tell whether"):
        load(bare, config=tmp_path / "config.py", device="cpu")


def test_the_config_overrides_the_checkpoint_and_a_guess_is_named(trained):
    config, checkpoint = trained("whole")
    config.test_dataloader.dataset.patch_size = 100
    predictor = load_predictor(config, checkpoint)
    assert predictor.window_size == 100 and predictor.window_of((120, 10)) == 100
    config, checkpoint = trained("patches")
    bare = torch.load(checkpoint, weights_only=False)["state_dict"]
    other = checkpoint.replace("iter_2", "bare")
    torch.save(bare, other)
    predictor = load_predictor(config, other)
    assert predictor.window_size == configs.native_size(config) == 128
    assert "does not tell whether" in predictor.remarks[0]
