# SPDX-License-Identifier: Apache-2.0
"""Every command with a tiny classifier, and mmpretrain's own tools on its files."""

import csv
import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import tiny
import torch
from helpers import needs_coremltools
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, DefaultScope, init_default_scope
from mmpretrain.apis import FeatureExtractor, ImageClassificationInferencer
from mmpretrain.evaluation import ConfusionMatrix
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mmeformer import configs, runtime
from mmeformer.classification import cam
from mmeformer.classification.datasets import ImageFolderDataset
from mmeformer.classification.hooks import ClassNumCheckHook
from mmeformer.commands import check_dataset, export, predict, profile, test
from mmeformer.inference import load_predictor
from mmeformer.paths import config_dir
from mmeformer.registry import DATASETS, MODELS
from mmeformer.training import engine

CLASSES = tuple(tiny.ANIMALS)
SIDE = 64


def arguments(*parts):
    return [str(part) for part in parts]


def pictures(root):
    return sorted((root / "val").rglob("*.png"))


# --- training and testing ------------------------------------------------------------------------


def test_trains_and_saves_what_it_trained(root, tmp_path):
    config = tiny.classifier(root)
    config.work_dir = str(tmp_path)
    runner = engine.build_train_runner(config)
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    runner.train()
    after = runner.model.state_dict()
    assert not torch.equal(before["head.fc.weight"], after["head.fc.weight"])
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    assert saved["state_dict"].keys() == after.keys()
    assert saved["meta"]["dataset_meta"]["classes"] == CLASSES


def test_tests_with_pictures_and_a_confusion_matrix(config_file, trained, root, tmp_path, capfd):
    out, folder = tmp_path / "found.pkl", tmp_path / "pictures"
    options = ("--work-dir", tmp_path / "w", "--out", out, "--show-dir", folder)
    assert test.main(arguments(config_file, trained, *options)) == 0
    said = float(re.findall(r"accuracy/top1: ([\d.]+)", "".join(capfd.readouterr()))[-1])
    found = pickle.loads(out.read_bytes())
    matrix = ConfusionMatrix.calculate(
        torch.stack([sample["pred_score"] for sample in found]),
        torch.cat([sample["gt_label"] for sample in found]),
        num_classes=len(CLASSES),
    )
    assert matrix.sum(1).tolist() == [2] * len(CLASSES)
    assert said == pytest.approx(100 * matrix.diag().sum().item() / len(found))
    assert len(list(folder.rglob("*.png"))) == len(pictures(root))


def test_the_documented_test_of_a_published_file(imagenet, tmp_path):
    """The scores of the command are those of timm's model on torchvision's pixels."""
    pixels = transforms.Compose(
        [
            transforms.Resize(256, InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    paths = sorted((imagenet / "val").rglob("*.png"))
    images = torch.stack([pixels(Image.open(path)) for path in paths])
    theirs = timm.create_model("efficientformerv2_s0").eval()
    with torch.no_grad():
        # Untrained, it would give all classes the same score.
        factor = 3 / theirs(images).std()
        for head in (theirs.head, theirs.head_dist):
            head.weight *= factor
        wanted = theirs(images).softmax(1)
    file, out = tmp_path / "published.pth", tmp_path / "found.pkl"
    torch.save(theirs.state_dict(), file)
    config = config_dir() / "classification/efficientformerv2-s0_450e_in1k.py"
    loader = dict(num_workers=0, persistent_workers=False)
    options = [f"test_dataloader.{key}={value}" for key, value in loader.items()]
    options.append(f"test_dataloader.dataset.data_root={imagenet}")
    folders = ("--work-dir", tmp_path, "--out", out)
    assert test.main(arguments(config, file, *folders, "--cfg-options", *options)) == 0
    found = pickle.loads(out.read_bytes())
    assert [sample["gt_label"].item() for sample in found] == [0, 1, 2, 3]
    assert (wanted[0] - wanted[1]).abs().max() > 0.001, "the pictures differ"
    for sample, scores in zip(found, wanted, strict=True):
        assert torch.allclose(sample["pred_score"], scores, atol=1e-5)


def test_evaluation_pixels_are_torchvisions():
    """Of the shipped test pipeline: Resize(256, bicubic) and CenterCrop(224)."""
    config = configs.load_config("classification/efficientformerv2-s0_300e_in1k.py")
    theirs = transforms.Compose(
        [transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        steps = [TRANSFORMS.build(s) for s in config.test_dataloader.dataset.pipeline[1:]]
    for height, width in ((333, 500), (257, 256), (700, 301), (224, 224)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        results = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        for step in steps:
            results = step(results)
        wanted = np.asarray(theirs(Image.fromarray(image)))
        assert np.array_equal(results["inputs"].permute(1, 2, 0).numpy(), wanted)


# --- prediction ----------------------------------------------------------------------------------


def scores_of(config_file, checkpoint, images):
    """Probabilities by mmpretrain's own inferencer."""
    inferencer = ImageClassificationInferencer(str(config_file), checkpoint, device="cpu")
    return [found["pred_scores"] for found in inferencer([str(image) for image in images])]


def test_predicts_what_mmpretrain_predicts(config_file, trained, root, tmp_path):
    images = pictures(root)
    options = ("--out", tmp_path, "--batch-size", 3, "--device", "cpu")
    assert predict.main(arguments(config_file, trained, root / "val", *options)) == 0
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


def test_mmpretrains_features_are_those_of_the_backbone(config_file, trained, root):
    extractor = FeatureExtractor(str(config_file), trained, device="cpu")
    path = str(pictures(root)[0])
    (maps,) = extractor(path, stage="backbone")
    (means,) = extractor(path, stage="pre_logits")
    assert [tuple(item.shape) for item in maps] == [(tiny.ARCH["widths"][3], 2, 2)]
    head = extractor.model.head
    assert torch.allclose(head.normalize([maps[0][None]]).mean((1, 2))[0], means, atol=1e-6)


def test_the_mean_of_an_activation_map_is_the_logit(config_file, trained, root):
    predictor = load_predictor(Config.fromfile(config_file), trained, device="cpu")
    image = cv2.imread(str(pictures(root)[0]))
    (result,) = predictor.predict_images([image])
    maps = [cam.activation_map(predictor, image, label)[0] for label in range(len(CLASSES))]
    logits = torch.tensor([activation.mean() for activation in maps])
    assert torch.allclose(logits.softmax(0), torch.from_numpy(result.scores), atol=1e-5)
    best, label = cam.activation_map(predictor, image)
    assert label == result.label and np.array_equal(best, maps[label])
    crop = cam.seen(predictor, image)
    assert np.array_equal(crop, image), "pictures of the crop's size stay as they are"
    assert cam.draw(crop, best).shape == (SIDE, SIDE, 3)


# --- exports -------------------------------------------------------------------------------------


def test_exported_files_are_checked_and_give_the_same_top1(
    config_file, trained, root, tmp_path, capfd
):
    out = tmp_path / "model.onnx"
    options = ("--to", "onnx", "--dynamic", "--out", out, "--images", pictures(root)[0])
    assert export.main(arguments(config_file, trained, *options)) == 0
    said = capfd.readouterr().out
    assert re.search(r"probabilities within \d", said) and "in a batch as alone" in said
    tops = []
    for weights in (trained, out):
        assert test.main(arguments(config_file, weights, "--work-dir", tmp_path / "w")) == 0
        text = "".join(capfd.readouterr())
        tops.append(re.findall(r"accuracy/top1: ([\d.]+)", text)[-1])
    assert tops[0] == tops[1]
    model = runtime.load(out)
    assert model.metadata.classes == CLASSES and model.metadata.crop == (SIDE, SIDE)
    y, x = np.mgrid[:150, :210]
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), (np.stack([x, y, x + y], -1) % 256).astype(np.uint8))
    (wanted,) = scores_of(config_file, trained, [path])
    assert np.allclose(model.predict(path).scores, wanted, atol=2e-2)


@pytest.mark.slow
def test_coreml(config_file, trained, tmp_path, capsys):
    needs_coremltools()
    out = tmp_path / "model.mlpackage"
    options = ("--to", "coreml", "--size", SIDE, SIDE, "--out", out)
    assert export.main(arguments(config_file, trained, *options)) == 0, capsys.readouterr().err
    assert out.is_dir() and "scores" in capsys.readouterr().out


def test_another_size_than_the_crop_is_refused(config_file, trained, tmp_path, capsys):
    options = ("--to", "onnx", "--size", 96, 96, "--out", tmp_path / "model.onnx")
    assert export.main(arguments(config_file, trained, *options)) == 1
    assert "must be that of the test pipeline's CenterCrop, (64, 64)" in capsys.readouterr().err


def test_profiles(config_file, capsys):
    options = ("--size", SIDE, SIDE, "--modes", "eager", "--rounds", 2)
    assert profile.main(arguments(config_file, *options)) == 0
    assert "head" in capsys.readouterr().out


@pytest.mark.parametrize("length", [7, 31, 64, 100, 513])
@pytest.mark.parametrize("full", [1, 30, 64, 333])
def test_resizing_is_pillows_in_each_direction(length, full):
    image = np.random.default_rng(0).integers(0, 256, (20, full, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((length, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(runtime.images.resize_bicubic(image, 20, length), wanted)
    image = image.transpose(1, 0, 2)
    wanted = np.asarray(Image.fromarray(image).resize((20, length), Image.Resampling.BICUBIC))
    assert np.array_equal(runtime.images.resize_bicubic(image, length, 20), wanted)


# --- the other tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_backbones_of_other_tasks_start_from_a_classifier(task, trained):
    config = tiny.network(task)
    # Other grids are resized.
    config.model.backbone.update(bias_grid=2, init_cfg=dict(type="Pretrained", checkpoint=trained))
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    model.init_weights()
    state = torch.load(trained)["state_dict"]
    ours = model.backbone.state_dict()
    assert {f"backbone.{name}" for name in ours} == {n for n in state if n.startswith("backbone.")}
    for name, tensor in ours.items():
        assert torch.equal(tensor, state[f"backbone.{name}"]), name


# --- data sets -----------------------------------------------------------------------------------


def test_a_sound_data_set_passes_the_check(config_file, tmp_path, capsys):
    assert check_dataset.main(arguments(config_file, "--out", tmp_path)) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert (tmp_path / "train.png").is_file() and (tmp_path / "val.png").is_file()


@pytest.mark.parametrize(
    "change, level, kind",
    [
        (lambda root: (root / "owl").rename(root / "owls"), "error", "unknown class"),
        (
            lambda root: next((root / "owl").iterdir()).write_bytes(b"x"),
            "error",
            "unreadable image",
        ),
        (lambda root: shutil.rmtree(root / "cat"), "warning", "unused class"),
    ],
)
def test_faults_of_data_sets_are_found(change, level, kind, root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    change(copy / "train")
    dataset = ImageFolderDataset(
        str(copy), dict(img_path="train"), metainfo=dict(classes=CLASSES), lazy_init=True
    )
    found = [(finding.severity, finding.kind) for finding in dataset.findings()]
    assert (level, kind) in found
    assert {other for other, _ in found} <= {level, "warning"}


def test_unreadable_validation_files_are_an_error_and_not_replaced(root, tmp_path):
    """As the data sets of validation and testing have ``test_mode=True`` in every config."""
    copy = shutil.copytree(root, tmp_path / "copy")
    next((copy / "val/owl").iterdir()).write_bytes(b"x")
    config = tiny.classifier(copy)
    init_default_scope(config.default_scope)
    for loader in (config.val_dataloader, config.test_dataloader):
        with pytest.raises(ValueError, match="cannot be read"):
            DATASETS.build(loader.dataset)


def test_labels_follow_the_names_not_the_order_of_folders(root):
    classes = ("owl", "cat", "fox", "dog")
    dataset = ImageFolderDataset(str(root), dict(img_path="val"), metainfo=dict(classes=classes))
    for index in range(len(dataset)):
        item = dataset.get_data_info(index)
        assert Path(item["img_path"]).parent.name == classes[item["gt_label"]]


@pytest.mark.parametrize("place", ["head", "head.loss", "data_preprocessor"])
def test_other_numbers_of_classes_are_named(place, root):
    """Also with LabelSmoothLoss, at which mmpretrain's own hook fails."""
    config = tiny.classifier(root)
    init_default_scope(config.default_scope)
    loader = SimpleNamespace(dataset=DATASETS.build(config.train_dataloader.dataset))
    runner = SimpleNamespace(
        model=MODELS.build(config.model), train_dataloader=loader, val_loop=None
    )
    ClassNumCheckHook().before_train(runner)
    module = runner.model.get_submodule({"head.loss": "head.loss_module"}.get(place, place))
    module.num_classes = 7
    with pytest.raises(ValueError, match=f"^model.{place}.num_classes=7, but .* has 4 classes"):
        ClassNumCheckHook().before_train(runner)
