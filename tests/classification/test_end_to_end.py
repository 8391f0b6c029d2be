# SPDX-License-Identifier: Apache-2.0
"""Every command with a tiny classifier on generated pictures."""

import csv
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tiny import ARCH, save_trained

pytest.importorskip("mmpretrain")
from mmpretrain.apis import ImageClassificationInferencer

from mmeformer import configs, runtime
from mmeformer.commands import check_dataset, export, predict, test
from mmeformer.synthetic.classes import write_class_dataset
from mmeformer.synthetic.shapes import CLASSES
from mmeformer.training import engine

QUICKSTART = "classification/efficientformerv2-s0_quickstart.py"


def tiny_config(root: Path) -> Config:
    """The quickstart with a tiny network, on pictures below ``root``."""
    config = configs.load_config(QUICKSTART)
    config.model.backbone.update(arch=ARCH)
    config.model.head.update(in_channels=ARCH["widths"][3])
    for name in ("train", "val", "test"):
        loader = config[f"{name}_dataloader"]
        loader.dataset.data_root = str(root)
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    config.train_cfg.update(max_epochs=2, val_interval=2)
    for schedule, (begin, end) in zip(config.param_scheduler, ((0, 1), (1, 2)), strict=True):
        schedule.update(begin=begin, end=end)
    config.default_hooks.checkpoint.update(interval=2)
    config.default_hooks.logger.update(interval=1)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classification")


@pytest.fixture(scope="module")
def root(folder):
    return write_class_dataset(folder / "data", train=16, val=8, size=64)


@pytest.fixture(scope="module")
def config_file(folder, root):
    """The tiny config as a file for command lines."""
    config = tiny_config(root)
    config.work_dir = str(folder / "run")
    path = folder / "tiny.py"
    config.dump(path)
    return path


@pytest.fixture(scope="module")
def trained(config_file, folder):
    """A checkpoint whose answers differ from picture to picture."""
    (folder / "weights").mkdir(exist_ok=True)
    config = Config.fromfile(config_file)
    path = save_trained(config, folder / "weights")
    content = torch.load(path)
    torch.nn.init.normal_(content["state_dict"]["head.fc.weight"], std=1.0)
    torch.save(content, path)
    return path


def test_trains_and_resumes_from_what_it_saved(root, tmp_path):
    config = tiny_config(root)
    config.work_dir = str(tmp_path)
    runner = engine.build_train_runner(config)
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    runner.train()
    after = runner.model.state_dict()
    assert not torch.equal(before["head.fc.weight"], after["head.fc.weight"])
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    assert saved["state_dict"].keys() == after.keys()
    assert saved["meta"]["dataset_meta"]["classes"] == CLASSES


def scores_of(config_file, checkpoint, images):
    """Probabilities by mmpretrain's own inferencer."""
    inferencer = ImageClassificationInferencer(str(config_file), checkpoint, device="cpu")
    return [found["pred_scores"] for found in inferencer([str(image) for image in images])]


def test_predicts_what_mmpretrain_predicts(config_file, trained, root, tmp_path):
    images = sorted((root / "val").rglob("*.png"))
    arguments = [config_file, trained, root / "val", "--out", tmp_path, "--batch-size", 3]
    assert predict.main([*map(str, arguments), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [category["name"] for category in found["categories"]] == list(CLASSES)
    assert len(found["images"]) == len(rows) == len(images)
    for image, row, path, wanted in zip(
        found["images"], rows, images, scores_of(config_file, trained, images), strict=True
    ):
        own = [a for a in found["annotations"] if a["image_id"] == image["id"]]
        order = np.argsort(-wanted)
        assert path.name in image["file_name"] and path.name in row["file_name"]
        assert [a["category_id"] - 1 for a in own] == order.tolist()
        assert np.allclose([a["score"] for a in own], wanted[order], atol=1e-4)
        assert row["class_1"] == CLASSES[order[0]] and row["class_5"] == ""
        assert float(row["score_2"]) == pytest.approx(wanted[order[1]], abs=1e-4)
    assert len(list((tmp_path / "pictures").rglob("*.jpg"))) == len(images)


def test_exported_files_are_checked_and_give_the_same_top1(config_file, trained, tmp_path, capfd):
    out = tmp_path / "model.onnx"
    arguments = [config_file, trained, "--to", "onnx", "--dynamic", "--out", out]
    assert export.main([str(argument) for argument in arguments]) == 0
    said = capfd.readouterr().out
    assert re.search(r"probabilities within \d", said) and "in a batch as alone" in said
    tops = []
    for weights in (trained, out):
        assert test.main([str(config_file), str(weights), "--work-dir", str(tmp_path / "w")]) == 0
        text = "".join(capfd.readouterr())
        tops.append(re.findall(r"accuracy/top1: ([\d.]+)", text)[-1])
    assert tops[0] == tops[1]


def test_the_runtime_reads_files_of_any_size(config_file, trained, tmp_path):
    out = tmp_path / "model.onnx"
    arguments = [config_file, trained, "--to", "onnx", "--size", 64, 64, "--out", out]
    assert export.main([str(argument) for argument in arguments]) == 0
    model = runtime.load(out)
    assert model.metadata.classes == CLASSES and model.metadata.crop == (64, 64)
    y, x = np.mgrid[:150, :210]
    smooth = np.stack([x, y, x + y], -1) % 256
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), smooth.astype(np.uint8))
    (wanted,) = scores_of(config_file, trained, [path])
    assert np.allclose(model.predict(path).scores, wanted, atol=2e-2)


def test_another_size_than_the_crop_is_refused(config_file, trained, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    arguments = [config_file, trained, "--to", "onnx", "--size", 96, 96, "--out", out]
    assert export.main([str(argument) for argument in arguments]) == 1
    assert "must be that of the test pipeline's CenterCrop, (64, 64)" in capsys.readouterr().err


@pytest.mark.parametrize("length", [7, 31, 64, 100, 513])
@pytest.mark.parametrize("full", [1, 30, 64, 333])
def test_resizing_is_pillows_in_each_direction(length, full):
    image = np.random.default_rng(0).integers(0, 256, (20, full, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((length, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(runtime.images.resize_bicubic(image, 20, length), wanted)
    image = image.transpose(1, 0, 2)
    wanted = np.asarray(Image.fromarray(image).resize((20, length), Image.Resampling.BICUBIC))
    assert np.array_equal(runtime.images.resize_bicubic(image, length, 20), wanted)


# --- data sets -----------------------------------------------------------------------------------


def test_a_sound_data_set_passes_the_check(config_file, tmp_path, capsys):
    assert check_dataset.main([str(config_file), "--out", str(tmp_path)]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert (tmp_path / "train.png").is_file() and (tmp_path / "val.png").is_file()


@pytest.fixture
def damaged(folder, root, tmp_path):
    """A function: (change of the data) -> (exit status, output) of check_dataset."""
    import shutil

    def check(change, capsys):
        copy = shutil.copytree(root, tmp_path / "copy")
        change(copy)
        config = tiny_config(copy)
        config.dump(tmp_path / "damaged.py")
        status = check_dataset.main(
            [str(tmp_path / "damaged.py"), "--split", "train", "--out", str(tmp_path / "out")]
        )
        captured = capsys.readouterr()
        return status, " ".join((captured.out + captured.err).split())

    return check


@pytest.mark.parametrize(
    "change, status, words",
    [
        (lambda root: (root / "train/star").rename(root / "train/stars"), 1, "unknown class"),
        (lambda root: next((root / "train/star").iterdir()).write_bytes(b"x"), 1, "unreadable"),
        (
            lambda root: [path.unlink() for path in (root / "train/circle").iterdir()],
            0,
            "unused class",
        ),
    ],
)
def test_faults_of_data_sets_are_found(change, status, words, damaged, capsys):
    found, text = damaged(change, capsys)
    assert found == status and words in text


def test_labels_follow_the_names_not_the_order_of_folders(root):
    from mmeformer.classification.datasets import ImageFolderDataset

    classes = ("star", "circle", "triangle", "rectangle")
    dataset = ImageFolderDataset(str(root), dict(img_path="val"), metainfo=dict(classes=classes))
    for index in range(len(dataset)):
        item = dataset.get_data_info(index)
        assert Path(item["img_path"]).parent.name == classes[item["gt_label"]]


def test_evaluation_pixels_are_torchvisions(root):
    """Of the shipped test pipeline: Resize(256, bicubic) and CenterCrop(224)."""
    from mmengine.registry import TRANSFORMS, DefaultScope
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    config = configs.load_config("classification/efficientformerv2-s0_300e_in1k.py")
    image = np.random.default_rng(0).integers(0, 256, (333, 500, 3), np.uint8)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        results = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        for step in config.test_dataloader.dataset.pipeline[1:]:
            results = TRANSFORMS.build(step)(results)
    theirs = transforms.Compose(
        [transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )(Image.fromarray(image))
    assert np.array_equal(results["inputs"].permute(1, 2, 0).numpy(), np.asarray(theirs))
