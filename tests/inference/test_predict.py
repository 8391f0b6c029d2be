# SPDX-License-Identifier: Apache-2.0
"""tools/predict.py with small models of the three tasks, against OpenMMLab's own inference."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from helpers import load_script
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

from mmeformer import configs
from mmeformer.files import is_draft
from mmeformer.inference import load_predictor
from mmeformer.paths import tools_dir
from mmeformer.training_images import TrainingImages

pytestmark = pytest.mark.usefixtures("quiet_logging")

CLASSES = {
    "detection": ("circle", "rectangle", "triangle", "star"),
    "rotated": ("ship", "vehicle", "plane", "court"),
    "segmentation": ("background", "circle", "rectangle", "triangle", "star"),
}


def predict_main(argv):
    """``main`` of the command line; an exit by argparse gives its status."""
    try:
        return load_script(tools_dir() / "predict.py").main([str(part) for part in argv])
    except SystemExit as stop:
        return stop.code


def scene(width, height, seed=0):
    """Bright rectangles on noise."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 80, (height, width, 3), np.uint8)
    for _ in range(max(2, width * height // 3000)):
        x, y = generator.integers(0, (width - 10, height - 10))
        cv2.rectangle(
            image,
            (int(x), int(y)),
            (int(x) + int(generator.integers(8, 40)), int(y) + int(generator.integers(8, 40))),
            generator.integers(100, 256, 3).tolist(),
            -1,
        )
    return image


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Configs and weights of tiny models, and a folder with images, a bad one and a video."""
    folder = tmp_path_factory.mktemp("predict")
    for task, make in tiny.TASKS.items():
        config = make(folder, iterations=1)
        config.dump(folder / f"{task}.py")
        init_default_scope(config.default_scope)
        configs.drop_pretrained(config.model)
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        # Statistics and scales of a trained model, so that folding has something to fold.
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith(("running_mean", ".bn.weight")):
                value.add_(torch.randn_like(value) * 0.2)
        meta = dict(config.test_dataloader.dataset.metainfo)
        weights = dict(meta=dict(dataset_meta=meta), state_dict=model.state_dict())
        torch.save(weights, folder / f"{task}.pth")
        torch.save(weights["state_dict"], folder / f"{task}_bare.pth")
    images = folder / "images"
    (images / "more").mkdir(parents=True)
    cv2.imwrite(str(images / "a.png"), scene(128, 96, 1))
    cv2.imwrite(str(images / "more" / "b.jpg"), scene(100, 128, 2))
    cv2.imwrite(str(images / "more" / "c.png"), scene(128, 96, 3))
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:2000])
    writer = cv2.VideoWriter(
        str(images / "clip.mkv"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64)
    )
    for index in range(3):
        writer.write(scene(96, 64, index))
    writer.release()
    (folder / "text.txt").write_text("hello")
    return folder


GOOD = ["a.png", "more/b.jpg", "more/c.png"]


def names(out, folder, suffix):
    return sorted(
        str(path.relative_to(out / folder).with_suffix(""))
        for path in (out / folder).rglob(f"*{suffix}")
    )


@pytest.mark.parametrize("task", list(tiny.TASKS))
def test_command_line(task, place, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = [place / f"{task}.py", place / f"{task}.pth", place / "images"]
    thr = [] if task == "segmentation" else ["--score-thr", "0"]
    status = predict_main([*arguments, "--out", out, "--batch-size", 2, "--device", "cpu", *thr])
    output = capfd.readouterr()
    assert status == 1, output.err
    assert re.search(r"skipped: .*images/bad.png is truncated", output.out), output.out
    assert "predicted on 6 images" in output.out
    assert "error: 1 inputs were skipped" in output.err and "Traceback" not in output.err

    frames = [f"clip/{index:06d}" for index in range(3)]
    assert names(out, "pictures", ".jpg") == ["a", "more/b", "more/c"]
    for name in ("a", "more/b"):
        # Drawn, and enlarged by a whole number.
        picture = cv2.imread(str(out / "pictures" / f"{name}.jpg"))
        image = cv2.imread(str(place / "images" / f"{name}.{'png' if name == 'a' else 'jpg'}"))
        assert picture.shape[0] == 5 * image.shape[0] and picture.shape[1] == 5 * image.shape[1]
        enlarged = cv2.resize(image, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        assert np.abs(picture.astype(int) - enlarged).mean() > 5
    assert cv2.VideoCapture(str(out / "videos" / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert not [path for path in out.rglob("*") if is_draft(path)]

    if task == "segmentation":
        assert names(out, "masks", ".png") == ["a", *frames, "more/b", "more/c"]
        assert not (out / "predictions.json").exists()
        legend = json.loads((out / "classes.json").read_text())
        assert [entry["name"] for entry in legend] == list(CLASSES[task])
        mask = Image.open(out / "masks" / "a.png")
        assert mask.mode == "P" and mask.size == (128, 96)
        assert mask.getpalette()[:15] == sum((entry["color"] for entry in legend), [])
        return
    assert not (out / "masks").exists() and not (out / "classes.json").exists()
    coco = COCO(str(out / "predictions.json"))
    assert sorted(
        (image["file_name"], image.get("frame", -1)) for image in coco.dataset["images"]
    ) == sorted([(name, -1) for name in GOOD] + [("clip.mkv", index) for index in range(3)])
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES[task])
    assert len(coco.dataset["annotations"]) > 20
    if task == "detection":
        for entry in coco.dataset["annotations"]:
            assert coco.annToMask(entry).sum() == entry["area"] or entry["area"] == 0
    else:
        assert names(out, "labels", ".txt") == ["a", *frames, "more/b", "more/c"]
        lines = (out / "labels" / "a.txt").read_text().splitlines()
        image = next(image for image in coco.dataset["images"] if image["file_name"] == "a.png")
        entries = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(lines) == len(entries) > 3
        for line, entry in zip(lines, entries, strict=True):
            numbers = [float(value) for value in line.split()[:8]]
            np.testing.assert_allclose(numbers, entry["segmentation"][0], atol=0.01)
            assert line.split()[8:] == [entry["category"], "0"]


@pytest.fixture(scope="module")
def predictors(place):
    """One predictor per task that reports whatever there is."""
    found = {}
    for task in tiny.TASKS:
        thr = None if task == "segmentation" else 0.0
        config = configs.load_config(place / f"{task}.py")
        found[task] = load_predictor(config, str(place / f"{task}.pth"), score_thr=thr)
    return found


def test_detections_are_those_of_mmdet(place, predictors):
    from mmdet.apis import inference_detector, init_detector

    options = {"model.test_cfg.rcnn.score_thr": 0.0}
    config = configs.load_config(place / "detection.py", options)
    model = init_detector(config, str(place / "detection.pth"), device="cpu")
    image = scene(128, 96, 1)
    expected = inference_detector(model, image).pred_instances
    (found,) = predictors["detection"].predict_images([image])
    assert len(found) == len(expected) > 5
    np.testing.assert_allclose(found.boxes, expected.bboxes, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)
    differing = np.count_nonzero(found.masks() != expected.masks.numpy())
    assert differing <= 1e-3 * expected.masks.sum()


def test_labels_are_those_of_mmseg(place, predictors):
    from mmseg.apis import inference_model, init_model

    config = configs.load_config(place / "segmentation.py")
    model = init_model(config, str(place / "segmentation.pth"), device="cpu")
    for size in ((128, 96), (101, 67)):
        image = scene(*size)
        expected = inference_model(model, image).pred_sem_seg.data[0].numpy()
        (found,) = predictors["segmentation"].predict_images([image])
        assert found.labels.dtype == np.uint8 and len(np.unique(expected)) > 1
        assert (found.labels != expected).mean() < 1e-3


def test_padding_of_the_data_preprocessor_is_taken_off(place):
    from mmseg.apis import inference_model, init_model

    options = {"model.data_preprocessor.test_cfg": dict(size=(160, 192))}
    config = configs.load_config(place / "segmentation.py", options)
    checkpoint = str(place / "segmentation.pth")
    image = scene(128, 96, 1)
    expected = inference_model(init_model(config, checkpoint, device="cpu"), image)
    config = configs.load_config(place / "segmentation.py", options)
    (found,) = load_predictor(config, checkpoint).predict_images([image])
    assert (found.labels != expected.pred_sem_seg.data[0].numpy()).mean() < 1e-3


def test_rotated_boxes_are_those_of_mmdet(place, predictors):
    from mmdet.apis import inference_detector, init_detector
    from mmdet.structures.bbox import get_box_tensor

    options = {"model.test_cfg.score_thr": 0.0}
    config = configs.load_config(place / "rotated.py", options)
    model = init_detector(config, str(place / "rotated.pth"), device="cpu")
    image = scene(128, 96, 1)
    expected = inference_detector(model, image).pred_instances
    (found,) = predictors["rotated"].predict_images([image])
    assert len(found.scores) == len(expected) > 5
    np.testing.assert_allclose(found.boxes, get_box_tensor(expected.bboxes), atol=1e-3)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("task", list(tiny.TASKS))
def test_neighbours_in_a_batch_change_nothing(task, predictors):
    predictor = predictors[task]
    images = [scene(128, 96, 1), scene(96, 128, 2), scene(128, 96, 3), scene(60, 50, 4)]
    together = predictor.predict_images(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = predictor.predict_images([image])
        if task == "segmentation":
            assert (alone.labels != found.labels).mean() < 1e-3
        else:
            np.testing.assert_allclose(alone.scores, found.scores, atol=1e-5)
            np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-2)


def test_models_are_folded(predictors):
    for predictor in predictors.values():
        kinds = [type(module).__name__ for module in predictor.model.backbone.modules()]
        assert "BatchNorm2d" not in kinds and "LayerScale" not in kinds
        assert not any(parameter.requires_grad for parameter in predictor.model.parameters())


def test_predictions_are_no_run_of_a_tracker(place, tmp_path):
    """ClearML begins a run as soon as its backend is built; so predictors build none."""
    config = configs.load_config(place / "detection.py")
    config.visualizer.vis_backends = [dict(type="ClearMLVisBackend", save_dir=str(tmp_path))]
    predictor = load_predictor(config, str(place / "detection.pth"))
    assert predictor.inferencer.visualizer._vis_backends == {}
    assert len(config.visualizer.vis_backends) == 1 and not any(tmp_path.iterdir())


def test_score_threshold_of_the_model(place, predictors):
    for task in ("detection", "rotated"):
        image = scene(128, 96, 1)
        (everything,) = predictors[task].predict_images([image])
        thr = float(np.sort(everything.scores)[-4]) - 1e-6
        config = configs.load_config(place / f"{task}.py")
        predictor = load_predictor(config, str(place / f"{task}.pth"), score_thr=thr)
        (sure,) = predictor.predict_images([image])
        kept = everything.scores > thr
        np.testing.assert_allclose(sure.boxes, everything.boxes[kept], atol=1e-3)
        assert 4 <= len(sure.scores) < len(everything.scores)


@pytest.mark.parametrize("task", ["detection", "rotated"])
def test_category_ids_of_the_training_and_a_choice_of_classes(task, place, tmp_path, predictors):
    weights = torch.load(place / f"{task}.pth", weights_only=False)
    weights["meta"]["dataset_meta"]["category_ids"] = [3, 90, 7, 20]
    torch.save(weights, tmp_path / "ids.pth")
    image = place / "images" / "a.png"
    (everything,) = predictors[task].predict_images([cv2.imread(str(image))])
    label = int(everything.labels[0])
    arguments = [place / f"{task}.py", tmp_path / "ids.pth", image, "--score-thr", 0]
    name = CLASSES[task][label]
    assert predict_main([*arguments, "--out", tmp_path / "out", "--classes", name]) == 0
    coco = COCO(str(tmp_path / "out" / "predictions.json"))
    named = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    assert named == dict(zip([3, 90, 7, 20], CLASSES[task], strict=True))
    found = [entry["category_id"] for entry in coco.dataset["annotations"]]
    assert found == [[3, 90, 7, 20][label]] * int((everything.labels == label).sum())
    config = configs.load_config(place / f"{task}.py")
    others = [other for other in CLASSES[task] if other != name]
    predictor = load_predictor(config, str(tmp_path / "ids.pth"), score_thr=0.0, classes=others)
    (rest,) = predictor.predict_images([cv2.imread(str(image))])
    assert len(rest) == len(everything) - len(found)


def test_score_threshold_of_a_head_that_does_not_know_it(place, tmp_path):
    """DETR reports every query, whatever its score."""
    import mmdet

    config = configs.load_config(place / "detection.py")
    folder = Path(mmdet.__file__).parent / ".mim" / "configs" / "detr"
    model = Config.fromfile(str(folder / "detr_r50_8xb2-150e_coco.py")).model
    model.backbone = copy.deepcopy(config.model.backbone)
    model.backbone.out_indices = (3,)
    model.neck.update(in_channels=[tiny.ARCH["widths"][-1]])
    model.bbox_head.num_classes = len(CLASSES["detection"])
    model.num_queries = model.test_cfg.max_per_img = 20
    model.encoder.num_layers = model.decoder.num_layers = 1
    config.model = model
    init_default_scope("mmdet")
    torch.save(MODELS.build(copy.deepcopy(model)).state_dict(), tmp_path / "detr.pth")
    image = scene(128, 96, 1)
    found = {}
    for thr in (0.0, 0.3, 0.999):
        predictor = load_predictor(config, str(tmp_path / "detr.pth"), score_thr=thr)
        (found[thr],) = predictor.predict_images([image])
    assert len(found[0.0]) == 20 and len(found[0.999]) == 0
    thr = float(np.median(found[0.0].scores))
    predictor = load_predictor(config, str(tmp_path / "detr.pth"), score_thr=thr)
    (sure,) = predictor.predict_images([image])
    assert 0 < len(sure) < 20 and sure.scores.min() > thr


def test_one_window_is_the_whole_image(predictors):
    image = scene(128, 128, 5)
    for task, predictor in predictors.items():
        assert predictor.native_size == 128
        (whole,) = predictor.predict_images([image])
        found = predictor.predict_windows(image, 128, 32, 2)
        if task == "segmentation":
            np.testing.assert_array_equal(found.labels, whole.labels)
        elif task == "detection":
            np.testing.assert_array_equal(found.boxes, whole.boxes)
            assert found.instance_masks == whole.instance_masks
        else:
            # Merging suppresses more than the model does.
            assert 0 < len(found.scores) <= len(whole.scores)


@pytest.mark.parametrize("task", list(tiny.TASKS))
def test_large_images_are_cut_and_merged(task, place, tmp_path, capfd):
    size = (300, 150) if task == "rotated" else (1100, 130)
    cv2.imwrite(str(tmp_path / "large.png"), scene(*size))
    out = tmp_path / "out"
    thr = [] if task == "segmentation" else ["--score-thr", "0.05"]
    arguments = [place / f"{task}.py", place / f"{task}.pth", tmp_path / "large.png"]
    assert predict_main([*arguments, "--out", out, "--batch-size", 4, *thr]) == 0, (
        capfd.readouterr()
    )
    if task == "segmentation":
        assert Image.open(out / "masks" / "large.png").size == size
    else:
        content = json.loads((out / "predictions.json").read_text())
        assert content["images"] == [
            dict(id=1, file_name="large.png", height=size[1], width=size[0])
        ]
    picture = cv2.imread(str(out / "pictures" / "large.jpg"))
    factor = max(1, 640 // size[0])
    assert picture.shape[:2] == (size[1] * factor, size[0] * factor)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_images_as_large_as_in_training_are_not_cut(task, predictors, monkeypatch):
    predictor = predictors[task]
    assert predictor.window_of((1100, 130)) == 128
    monkeypatch.setattr(predictor, "training_images", TrainingImages((600, 1200)))
    assert predictor.window_of((1100, 130)) is None
    assert predictor.scale_warning((1100, 130), None) is None
    assert "objects appear at 4.7 times the scale" in predictor.scale_warning((1100, 130), 128)


def test_another_scale_than_in_training_is_told_once(place, tmp_path, capfd):
    weights = torch.load(place / "rotated.pth", weights_only=False)
    weights["meta"]["dataset_meta"].update(TrainingImages((40, 50)).to_meta())
    torch.save(weights, tmp_path / "whole.pth")
    arguments = [place / "rotated.py", tmp_path / "whole.pth", place / "images" / "*" / "*"]
    assert predict_main([*arguments, "--out", tmp_path / "out", "--no-pictures"]) == 0
    output = capfd.readouterr()
    assert output.out.count("warning: ") == 2 and "note: " not in output.err
    assert re.search("warning: .*b.jpg: objects appear at 0.39 times the scale", output.out)
    assert "warning: of 2 images, objects appear at another scale" in output.out


@pytest.mark.parametrize("task", list(tiny.TASKS))
def test_images_of_extreme_shapes(task, predictors):
    predictor = predictors[task]
    for width, height in ((1, 1), (3, 200), (200, 3)):
        image = np.full((height, width, 3), 90, np.uint8)
        (found,) = predictor.predict_images([image])
        picture = predictor.draw(image, found)
        factor = max(1, 640 // max(width, height))
        assert picture.shape[:2] == (height * factor, width * factor)
    long = np.zeros((20, 5000, 3), np.uint8)
    found = predictor.predict_windows(long, 128, 0, 8)
    assert predictor.draw(long, found).shape[1] == 4096


def test_many_objects_are_drawn_without_names_in_several_goes(predictors, monkeypatch):
    predictor = predictors["detection"]
    image = scene(200, 200)
    (found,) = predictor.predict_images([image])
    few = predictor.draw(image, found.take([0]))
    assert few.shape == (600, 600, 3) and predictor.inferencer.visualizer.names
    many = found.take(list(range(len(found))) * 4)
    assert len(many) * 5000 > 600 * 600
    goes = []
    draw = predictor.inferencer.visualizer.add_datasample
    monkeypatch.setattr(
        predictor.inferencer.visualizer,
        "add_datasample",
        lambda *args, **kwargs: (goes.append(args), draw(*args, **kwargs)),
    )
    monkeypatch.setattr("mmeformer.detection.visualizer.DRAWN_AT_ONCE", 30 * 600 * 600)
    predictor.draw(image, many)
    assert not predictor.inferencer.visualizer.names
    assert len(goes) == -(-len(many) // 30)


def test_masks_are_blended_as_by_mmengine():
    from mmdet.visualization import DetLocalVisualizer

    from mmeformer.detection.visualizer import InstanceVisualizer

    image = scene(90, 60)
    masks = np.zeros((3, 60, 90), bool)
    masks[0, 5:40, 10:50] = masks[1, 20:60, 30:90] = True  # the third has no pixel
    colors = [(250, 10, 30), (0, 200, 100), (1, 2, 3)]
    pictures = []
    for kind in (DetLocalVisualizer, InstanceVisualizer):
        visualizer = kind()
        visualizer.set_image(image)
        visualizer.draw_binary_masks(masks, colors=colors, alphas=0.6)
        pictures.append(visualizer.get_image().astype(int))
    assert np.abs(pictures[0] - image).mean() > 20
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1)


def test_mask_as_gray_values(place, tmp_path, predictors):
    arguments = [place / "segmentation.py", place / "segmentation.pth", place / "images" / "a.png"]
    options = ["--out", tmp_path, "--mask-format", "ids", "--no-pictures"]
    assert predict_main([*arguments, *options]) == 0
    mask = Image.open(tmp_path / "masks" / "a.png")
    assert mask.mode == "L" and not (tmp_path / "pictures").exists()
    image = cv2.imread(str(place / "images" / "a.png"))
    (found,) = predictors["segmentation"].predict_images([image])
    np.testing.assert_array_equal(np.array(mask), found.labels)


@pytest.mark.parametrize("task", list(tiny.TASKS))
def test_classes_of_weights_without_any(task, place):
    config = configs.load_config(place / f"{task}.py")
    predictor = load_predictor(config, str(place / f"{task}_bare.pth"))
    assert predictor.classes == CLASSES[task]
    del config.test_dataloader.dataset.metainfo
    if task == "segmentation":
        with pytest.raises(ValueError, match="names the classes: set test_dataloader.dataset"):
            load_predictor(config, str(place / f"{task}_bare.pth"))


def test_the_config_is_left_as_it_is(place):
    config = configs.load_config(place / "detection.py")
    before = Config(config.copy().to_dict()).pretty_text
    load_predictor(config, str(place / "detection.pth"), score_thr=0.7)
    assert Config(config.copy().to_dict()).pretty_text == before


DET = "{p}/detection.py {p}/detection.pth "
ERRORS = [
    ("{p}/gone.py {p}/detection.pth {p}/images", "config .*gone.py does not exist"),
    (
        "mask-rcnn_efficientformerv2-s0_1x_coco.py {p}/detection.pth {p}/images",
        "did you mean configs/detection/mask",
    ),
    ("{p}/detection.py {p}/gone.pth {p}/images", "checkpoint .*gone.pth does not exist"),
    ("{p}/detection.py {p}/text.txt {p}/images", "text.txt is neither a PyTorch"),
    ("{p}/detection.py {p}/segmentation.pth {p}/images", "segmentation.pth does not fit this"),
    ("{p}/rotated.py {p}/detection.pth {p}/images", "detection.pth does not fit this config"),
    ("{p}/segmentation.py {p}/rotated.pth {p}/images", "rotated.pth does not fit this config"),
    (DET + "{p}/gone.png", "input .*gone.png does not exist"),
    (DET + "{p}/gone/*.png", "no image or video matches"),
    (DET + "{p}/images --score-thr -0.1", "score threshold -0.1 must be at least 0"),
    (DET + "{p}/images --score-thr 1.5", "score threshold 1.5 must be"),
    (DET + "{p}/images --batch-size 0", "batch size 0 must be at least 1"),
    (DET + "{p}/images --window 7", "window 7 must be at least 32"),
    (DET + "{p}/images --overlap -3", "overlap -3 must not be negative"),
    (DET + "{p}/images --overlap 500", "overlap 500 must be less than the window, 128"),
    (DET + "{p}/images --classes cat star", r"no class \['cat'\], only \['circle', 'rect"),
    (
        "{p}/segmentation.py {p}/segmentation.pth {p}/images --classes star",
        "a choice of classes is for detection",
    ),
    (DET + "{p}/images --mask-format ids", "a mask format is for segmentation"),
    (DET + "{p}/images --device cuda:77", "device cuda:77 cannot be used here"),
    (DET + "{p}/images --device gpu", "device gpu cannot be used here"),
    (DET + "{p}/images --out {p}/text.txt", "output folder .*text.txt cannot be written"),
    (DET + "{p}/images --cfg-options default_scope=mmpose", "set it to one of mmdet"),
    (
        "{p}/segmentation.py {p}/segmentation.pth {p}/images --score-thr 0.5",
        "a score threshold is for detection",
    ),
    ("{p}/detection.py {p}/detection.pth", "the following arguments are required: INPUT"),
]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_a_missing_device_is_a_short_line(place):
    config = Config.fromfile(place / "detection.py")
    with pytest.raises(ValueError, match="device mps cannot be used here") as caught:
        load_predictor(config, str(place / "detection.pth"), device="mps")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[text for text, _ in ERRORS])
def test_mistakes_are_one_readable_error(place, tmp_path, capfd, arguments, message):
    argv = arguments.format(p=place).split()
    out = [] if "--out" in argv else ["--out", str(tmp_path / "out")]
    assert predict_main([*argv, *out]) in (1, 2)
    error = capfd.readouterr().err
    assert len(re.findall(r"^(?:\S+: )?error: ", error, re.MULTILINE)) == 1, error
    assert re.search(message, error) and "Traceback" not in error, error
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_fault_of_the_model_keeps_its_traceback(place, tmp_path, capfd, monkeypatch):
    from mmeformer.detection.predictor import DetectionPredictor

    def results_of_batch(self, batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DetectionPredictor, "results_of_batch", results_of_batch)
    argv = [place / "detection.py", place / "detection.pth", place / "images" / "a.png"]
    assert predict_main([*argv, "--out", tmp_path]) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error and error.endswith("error: out of memory\n")
    assert [path.name for path in tmp_path.iterdir()] == [".mmeformer-predictions"]


def test_images_and_labels_of_the_user_are_not_replaced(place, tmp_path, capfd):
    own = tmp_path / "own"
    (own / "pictures").mkdir(parents=True)
    content = (place / "images" / "a.png").read_bytes()
    (own / "pictures" / "a.jpg").write_bytes(content)
    (own / "b.png").write_bytes(content)
    argv = [place / "detection.py", place / "detection.pth", own]
    assert predict_main([*argv, "--out", own]) == 1
    error = capfd.readouterr().err
    assert re.search(r"^error: .*own/b.png was not written .* with --out$", error, re.M)
    assert sorted(path.name for path in own.rglob("*")) == ["a.jpg", "b.png", "pictures"]
    assert (own / "pictures" / "a.jpg").read_bytes() == content
    # In another folder they are inputs, of the first run and of the next; outputs never are.
    for _ in range(2):
        assert predict_main([*argv, "--out", own / "out"]) == 0
        assert "predicted on 2 images" in capfd.readouterr().out
    assert names(own / "out", "pictures", ".jpg") == ["b", "pictures/a"]


PROGRAM = """
import sys
for name in sys.argv[4].split(","):
    sys.modules[name] = None
import cv2
from mmeformer.configs import load_config
from mmeformer.inference import load_predictor
predictor = load_predictor(load_config(sys.argv[1]), sys.argv[2])
predictor.predict_images([cv2.imread(sys.argv[3])])
"""


@pytest.mark.install
@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("detection", "mmseg,mmrotate,onnxruntime"),
        ("segmentation", "mmdet,mmrotate,shapely,onnxruntime"),
    ],
)
def test_each_task_needs_its_own_packages_only(task, missing, place):
    result = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM, place / f"{task}.py", place / f"{task}.pth"),
            *(place / "images" / "a.png", missing),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
