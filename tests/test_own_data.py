# SPDX-License-Identifier: Apache-2.0
"""From a folder to a config that trains: all tasks, settings with reasons, nothing written over."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import cv2
import labeled_sets as sets
import numpy as np
import pytest
import tiny
import torch
from mmengine.registry import DATASETS, init_default_scope

from mmeformer import configs, own_data, signals, starter, tasks
from mmeformer.classification import starter as classification_starter
from mmeformer.detection import annotations
from mmeformer.detection import starter as detection_starter
from mmeformer.errors import UserError
from mmeformer.formats import coco
from mmeformer.formats.find import read_folder
from mmeformer.formats.tree import Options
from mmeformer.labeled import (
    BOXES,
    CORNERS,
    FOLDERS,
    MASKS,
    POLYGONS,
    LabeledData,
    LabeledImage,
    LabeledObject,
)
from mmeformer.paths import config_dir
from mmeformer.rotated import starter as rotated_starter
from mmeformer.segmentation import starter as segmentation_starter
from mmeformer.training import trial

WRITERS = {
    "detection": lambda root: sets.write_coco(root).parent,
    "segmentation": lambda root: sets.write_masks(root, values={1: 7, 2: 3}),
    "rotated": lambda root: sets.write_dota(root),
}


@pytest.fixture(scope="module", autouse=True)
def no_trial_steps():
    """A step of a whole network takes seconds; :func:`test_trial_steps` takes one of a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_data, "_seconds", lambda config: 0.5)
        yield


def make(root, out, **request):
    lines: list[str] = []
    request.setdefault("weights", own_data.SCRATCH)
    made = own_data.make(own_data.Request(root, out, **request), lines.append)
    return made, "\n".join(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config made for every task, and what was reported."""
    folder = tmp_path_factory.mktemp("own")
    return {
        name: (*make(write(folder / name), folder / f"my_{name}.py"), folder / name)
        for name, write in WRITERS.items()
    }


def settings_of(path):
    """Lines of the config that are settings, by name."""
    head = Path(path).read_text().split("\n\n")[0].splitlines()
    return {line.split(" = ")[0]: line for line in head if " = " in line}


def places(config):
    """Folder of the labels of each split."""
    found = []
    for loader in (config.train_dataloader, config.val_dataloader):
        data = loader.dataset
        path = Path(data.ann_file)
        found.append(f"{path.parent}/" if path.is_absolute() else data.data_root)
    return found


@pytest.mark.parametrize("task", WRITERS)
def test_settings_are_alive(made, task, tmp_path):
    """Changing a line of the config changes the training."""
    result, _, _ = made[task]
    before = configs.load_config(result.config)
    changes = {
        "checkpoint": (
            '"a.pth"',
            lambda c: (c.model.backbone.init_cfg or {}).get("checkpoint"),
            "a.pth",
        ),
        "batch_size": ("3", lambda c: c.train_dataloader.batch_size, 3),
        "num_workers": ("5", lambda c: c.val_dataloader.num_workers, 5),
        "learning_rate": ("0.5", lambda c: c.optim_wrapper.optimizer.lr, 0.5),
        "full_rate": (
            "0.4",
            lambda c: c.param_scheduler[1].begin == int(0.4 * c.param_scheduler[1].end),
            True,
        ),
        "warmup_iters": ("7", lambda c: c.param_scheduler[0].end, 7),
        "optimizer_type": ('"AmpOptimWrapper"', lambda c: c.optim_wrapper.type, "AmpOptimWrapper"),
        "averaging": ("30", lambda c: c.custom_hooks[-1].gamma, 30),
        "epochs": ("9", lambda c: (c.train_cfg.max_epochs, c.param_scheduler[1].end), (9, 9)),
        # Less than the warm-up, which the rest of the schedule then begins before.
        "max_iters": (
            "5",
            lambda c: (c.train_cfg.max_iters, c.param_scheduler[1].begin, c.param_scheduler[1].end),
            (5, 2, 5),
        ),
        "scale": ("(99, 88)", lambda c: c.test_dataloader.dataset.pipeline[1].scale, (99, 88)),
        "size": ("(99, 88)", lambda c: c.test_dataloader.dataset.pipeline[1].scale, (99, 88)),
        "scales": (
            "(0.9, 1.1)",
            lambda c: c.train_dataloader.dataset.pipeline[2].ratio_range,
            (0.9, 1.1),
        ),
        "crop_size": ("(64, 32)", lambda c: c.model.test_cfg.crop_size, (64, 32)),
        "class_weight": (
            "[1, 2, 3]",
            lambda c: c.model.decode_head.loss_decode.class_weight,
            [1, 2, 3],
        ),
        "anchor_scale": (
            "6",
            lambda c: c.model.get("rpn_head", c.model.get("bbox_head")).anchor_generator.scales,
            [6],
        ),
        "anchor_ratios": ("[1.0]", lambda c: c.model.rpn_head.anchor_generator.ratios, [1.0]),
        "flips": (
            "[0.1, 0.2, 0.3]",
            lambda c: [
                (step.prob, step.direction)
                for step in c.train_dataloader.dataset.pipeline
                if step.type.endswith("RandomFlip")
            ],
            [([0.1, 0.2, 0.3], ["horizontal", "vertical", "diagonal"])],
        ),
        "rotate": ("0.25", lambda c: c.train_dataloader.dataset.pipeline[5].prob, 0.25),
        "rois_per_image": ("4", lambda c: c.model.train_cfg.rcnn.sampler.num, 4),
        "data_root": ('"/d/"', lambda c: c.train_dataloader.dataset.data_root, "/d/"),
        "labels": ('"/l/"', lambda c: places(c)[0], "/l/"),
        "classes": (
            '("x", "y")',
            lambda c: c.train_dataloader.dataset.metainfo.classes,
            ("x", "y"),
        ),
    }
    names = settings_of(result.config)
    lines = result.config.read_text().splitlines()
    for index, line in enumerate(lines):
        name = line.split(" = ")[0]
        if name in names and name in changes:
            lines[index] = f"{name} = {changes[name][0]}"
    changed = tmp_path / "changed.py"
    changed.write_text("\n".join(lines))
    config = configs.load_config(changed)
    for name in set(names) - {"_base_"}:
        _, read, expected = changes[name]
        assert read(config) == expected and read(before) != expected, name


@pytest.mark.parametrize("task", WRITERS)
def test_config_is_short_and_says_why(made, task):
    result, report, root = made[task]
    text = result.config.read_text()
    assert result.errors == 0 and len(text.splitlines()) <= 60
    reasons = settings_of(result.config)
    for name in ("classes", "checkpoint", "batch_size", "num_workers", "learning_rate"):
        assert "  # " in reasons[name], name
    assert all("  # " in line for name, line in reasons.items() if name != "_base_")
    assert "training steps of 0.5 s: about" in report
    assert str(root) in report and str(result.config) in report


def test_long_trainings_can_be_made_shorter():
    assert own_data.training_time(100, 0.5, Path("a/b.py")) == (
        "100 training steps of 0.5 s: about 1 minute here"
    )
    assert own_data.training_time(4480, 20, Path("a/b.py")).endswith(
        "about 25 hours here (shorter: fewer epochs or smaller images in b.py)"
    )


def test_config_can_be_moved(made, tmp_path):
    """Config and labels in another folder, and a template that is found where the package is."""
    result, _, _ = made["detection"]
    shutil.copy(result.config, tmp_path)
    labels = result.config.with_name("my_detection_data")
    shutil.copytree(labels, tmp_path / labels.name)
    config = configs.load_config(tmp_path / result.config.name)
    assert Path(config.train_dataloader.dataset.ann_file) == tmp_path / labels.name / "train.json"
    text = result.config.read_text()
    assert str(labels) not in text and str(config_dir()) not in text
    gone = tmp_path / "gone.py"
    gone.write_text(text.replace("_custom.py", "_of_old.py"))
    with pytest.raises(
        ValueError, match="fpn_of_old.py; set _base_ to another of .* mmeformer init"
    ):
        configs.load_config(gone)


@pytest.mark.parametrize("task", WRITERS)
def test_config_trains(made, task, tmp_path):
    """Two iterations of a tiny network on the data of the config, and its validation."""
    result, _, _ = made[task]
    config = tiny.network(task, str(result.config))
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=2)
    config.param_scheduler = []
    config.log_processor.by_epoch = False
    config.default_hooks.checkpoint.update(by_epoch=False, interval=2)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    losses = tiny.train(config, tmp_path)
    assert len(losses) == 2 and all(map(math.isfinite, losses.values()))
    saved = torch.load(tmp_path / "iter_2.pth", weights_only=False)
    assert "ema_state_dict" in saved
    found = {name: len(saved["meta"]["dataset_meta"][name]) for name in ("classes",)}
    assert found["classes"] == len(configs.read_test_metainfo(config)["classes"])


def test_coco_file_is_that_of_the_folder(made):
    result, _, _ = made["detection"]
    labels = result.config.with_name("my_detection_data")
    entries = {
        split: json.loads((labels / f"{split}.json").read_text()) for split in ("train", "val")
    }
    names = [image["file_name"] for entry in entries.values() for image in entry["images"]]
    assert sorted(names) == sorted(f"images/{name}.png" for name in sets.NAMES)
    for entry in entries.values():
        for image in entry["images"]:
            name = Path(image["file_name"]).stem
            found = [a for a in entry["annotations"] if a["image_id"] == image["id"]]
            np.testing.assert_allclose(
                [a["bbox"] for a in found], sets.upright(name), atol=0.5, rtol=0
            )
            outlines = [sets.outline(name, index).ravel() for index in range(len(found))]
            np.testing.assert_allclose(
                [a["segmentation"][0] for a in found], outlines, atol=0.5, rtol=0
            )


def test_masks_become_labels(made):
    """The numbers 0, 3 and 7 become 0, 1 and 2."""
    result, report, _ = made["segmentation"]
    labels = result.config.with_name("my_segmentation_data")
    for split, names in (("train", sets.NAMES[:4]), ("val", sets.NAMES[4:])):
        for line, name in zip(
            (labels / f"{split}.txt").read_text().splitlines(), sorted(names), strict=True
        ):
            image, mask = line.split("\t")
            assert image == f"images/{split}/{name}.jpg"
            expected = sets.mask_of(name)
            found = cv2.imread(mask, cv2.IMREAD_UNCHANGED)
            table = np.arange(256)
            table[[1, 2]] = [2, 1]
            np.testing.assert_array_equal(found, table[expected])


def test_plain_masks_are_referenced(tmp_path):
    result, _ = make(sets.write_masks(tmp_path / "data"), tmp_path / "a.py")
    line = (tmp_path / "a_data" / "train.txt").read_text().splitlines()[0]
    assert line == "images/train/apple.jpg\tmasks/train/apple.png"
    assert not (tmp_path / "a_data" / "masks").exists() and result.errors == 0


def test_rotated_boxes_are_those_of_the_folder(made):
    from mmeformer.rotated.dota import list_images, read_labels

    result, _, root = made["rotated"]
    labels = result.config.with_name("my_rotated_data")
    assert set(list_images(labels / "train" / "images.txt")) == set(sets.NAMES[:4])
    for path in labels.rglob("labels/*.txt"):
        found = np.stack([item.polygon for item in read_labels(path)])
        np.testing.assert_allclose(found, sets.quadrilaterals(path.stem), atol=0.02)


def test_other_tasks_on_request(tmp_path):
    root = sets.write_coco(tmp_path / "data").parent
    _, report = make(root, tmp_path / "a.py", task="segmentation")
    config = configs.load_config(tmp_path / "a.py")
    assert config.classes == ("background", *sets.CLASSES) and "masks are drawn" in report
    line = (tmp_path / "a_data" / "train.txt").read_text().splitlines()[0]
    image, mask = line.split("\t")
    found = cv2.imread(mask, cv2.IMREAD_UNCHANGED)
    expected = sets.mask_of(Path(image).stem)
    # The outline itself, which the expected mask has, is a pixel wide.
    assert (found[2:] == expected[2:]).mean() > 0.95 and set(np.unique(found)) == {0, 1, 2}


class TestQuestions:
    def test_every_kind_of_labels_has_a_task(self):
        known = {kind for task in tasks.TASKS.values() for kind in task.labels}
        assert known == set(own_data._KINDS)

    def test_a_task_that_does_not_fit(self, tmp_path):
        root = sets.write_masks(tmp_path / "data")
        with pytest.raises(
            UserError, match="detection cannot be trained on .*masks: a class for each pixel"
        ):
            make(root, tmp_path / "a.py", task="detection")

    def test_unknown_arch_and_weights(self, tmp_path):
        root = sets.write_dota(tmp_path / "data")
        with pytest.raises(UserError, match="--arch s9 is unknown; choose one of l1, l3, l7, s0"):
            make(root, tmp_path / "a.py", arch="s9")
        with pytest.raises(UserError, match="--weights gone.pth does not exist"):
            make(root, tmp_path / "a.py", weights="gone.pth")


class TestNothingIsWrittenOver:
    @pytest.mark.parametrize("existing", ["a.py", "a_data/x.txt"])
    def test_existing_files(self, tmp_path, existing):
        root = sets.write_dota(tmp_path / "data")
        (tmp_path / existing).parent.mkdir(exist_ok=True)
        (tmp_path / existing).write_text("precious")
        with pytest.raises(UserError, match=f"{existing.split('/')[0]} exists"):
            make(root, tmp_path / "a.py")
        assert (tmp_path / existing).read_text() == "precious"

    def test_what_a_killed_process_left_is_made_again(self, tmp_path, monkeypatch):
        root = sets.write_dota(tmp_path / "data")
        request = own_data.Request(root, tmp_path / "a.py", weights=own_data.SCRATCH)

        class Killed(BaseException):
            pass

        def kill(*args):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(own_data, "config_text", kill)
            patch.setattr(own_data, "_remove", lambda *paths: None)
            with pytest.raises(Killed):
                make(root, tmp_path / "a.py")
        assert (tmp_path / "a_data").is_dir() and own_data.made_before(request) is None
        made, _ = make(root, tmp_path / "a.py")
        assert own_data.made_before(request) == made.config
        assert not list(tmp_path.glob(".a*"))

    def test_bad_labels_are_found_before_anything_is_written(self, tmp_path):
        root = sets.write_yolo(tmp_path / "data")
        path = root / "labels" / "train" / "apple.txt"
        path.write_text(path.read_text() + "0 0.5 0.5 0.001 0.001\n")
        with pytest.raises(UserError, match=f"{path}: line 3: the box of 0.064 x"):
            make(root, tmp_path / "a.py")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
        made, report = make(root, tmp_path / "a.py", skip_bad=True)
        assert made.errors == 0 and "1 errors: these files and objects are left out" in report
        assert f"error: {path}: line 3" in report

    def test_never_in_the_data(self, tmp_path, monkeypatch):
        root = sets.write_dota(tmp_path / "data")
        monkeypatch.chdir(root)
        with pytest.raises(UserError, match="would be written into your data.*--out"):
            make(Path("."), None)

    def test_a_failure_leaves_nothing(self, tmp_path, monkeypatch):
        root = sets.write_dota(tmp_path / "data")
        monkeypatch.setattr(own_data, "_machine", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(root, tmp_path / "a.py")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


# --- settings ------------------------------------------------------------------------------------


def data_of(width, height, box, count=100, kind="boxes", classes=("a",)):
    images = [
        LabeledImage(
            Path(f"{i}.png"),
            width,
            height,
            [LabeledObject(0, (5.0, 5.0, *box))],
            split="train" if i < count else "val",
        )
        for i in range(count + 2)
    ]
    return LabeledData("format", Path("/data"), kind, classes, images)


PLAN = starter.Plan(own_data.find_arch("s0"), "timm://x", Path("/labels"), None, 2)


def values(found):
    return {item.name: item.value for item in found}


@pytest.mark.parametrize(
    ("size", "box", "scale", "anchor"),
    [
        ((256, 256), (40, 40), "(256, 256)", "8"),
        ((256, 256), (10, 10), "(416, 416)", "4"),
        ((256, 256), (4, 4), "(512, 512)", "2"),
        ((1920, 1080), (60, 60), "(1333, 768)", "8"),
    ],
)
def test_size_and_anchors_of_detection(size, box, scale, anchor):
    data = data_of(*size, box, kind="polygons")
    found = values(detection_starter.STARTER.settings(data, PLAN))
    assert found["scale"] == scale and found["anchor_scale"] == anchor
    assert found["anchor_ratios"] == "[0.5, 1.0, 2.0]"


@pytest.mark.parametrize(
    ("size", "box", "scale", "stride"),
    [
        ((256, 256), (40, 40), "(256, 256)", "8"),
        ((256, 256), (10, 10), "(416, 416)", "8"),
        ((256, 256), (4, 4), "(512, 512)", "4"),
        ((1920, 1080), (60, 60), "(640, 384)", "8"),
        ((1920, 1080), (20, 20), "(1333, 768)", "4"),
    ],
)
def test_size_and_strides_of_the_light_detector(size, box, scale, stride):
    found = values(detection_starter.STARTER.settings(data_of(*size, box), PLAN))
    assert found["scale"] == scale and found["stride"] == stride
    assert detection_starter.STARTER.default_batch(data_of(*size, box)) == 8


def test_long_boxes_get_long_anchors():
    data = data_of(256, 256, (80, 10), kind="polygons")
    found = values(detection_starter.STARTER.settings(data, PLAN))
    assert found["anchor_ratios"] == "[0.25, 0.5, 1.0, 2.0, 4.0]"


@pytest.mark.parametrize(
    ("objects", "gpu", "rois"),
    [(1, None, "32"), (4, None, "32"), (8, None, "64"), (27, None, "128"), (1, "H100", "512")],
)
def test_boxes_to_train_on_follow_the_objects(objects, gpu, rois):
    data = data_of(256, 256, (40, 40), kind="polygons")
    for image in data.images:
        image.objects *= objects
    plan = dataclasses.replace(PLAN, gpu=gpu)
    assert values(detection_starter.STARTER.settings(data, plan))["rois_per_image"] == rois


def test_epochs():
    assert [starter.epochs_for(n) for n in (10, 100, 1000, 100_000)] == [200, 100, 32, 12]


def test_rare_classes_get_weights():
    data = data_of(64, 64, (9, 9), kind=MASKS, classes=("sky", "pole"))
    for image in data.images:
        image.objects, image.pixels = [], {0: 9900, 1: 100}
    line = segmentation_starter.STARTER._class_weight(data)
    # Median share 0.5: roots of 0.5 / 0.99 and 0.5 / 0.01, the latter cut to 5.
    assert line.value == "[0.71, 5.0]" and "pole has 1.00%" in line.reason
    for image in data.images:
        image.pixels = {0: 5000, 1: 5000}
    assert segmentation_starter.STARTER._class_weight(data).value == "None"


@pytest.mark.parametrize(
    ("width", "height", "scales"),
    [
        (128, 128, "(1.0, 1.25)"),
        (480, 360, "(0.98, 1.25)"),
        (600, 800, "(0.85, 1.25)"),
        (2048, 1024, "(0.75, 1.25)"),
        (20, 20, "(1.0, 1.25)"),
    ],
)
def test_crops_of_label_maps_are_not_padded(width, height, scales):
    data = data_of(width, height, (10, 10), kind=MASKS)
    for image in data.images:
        image.pixels = {0: 9}
    assert values(segmentation_starter.STARTER.settings(data, PLAN))["scales"] == scales


def test_gpu_changes_precision_batch_and_workers():
    data = data_of(256, 256, (40, 40))
    plan = dataclasses.replace(PLAN, gpu="H100", cores=64, batch_size=16)
    found = values(detection_starter.STARTER.common(data, plan))
    assert found["optimizer_type"] == '"AmpOptimWrapper"' and found["batch_size"] == "16"
    assert found["num_workers"] == "8"
    assert found["learning_rate"] == "min(0.005, 0.0001 * (batch_size / 2) ** 0.5)"
    scratch = dataclasses.replace(plan, checkpoint=None)
    for kind, rate in ((BOXES, "min(0.005, 0.0025"), (POLYGONS, "min(0.002, 0.001")):
        one = data_of(256, 256, (40, 40), kind=kind)
        found = values(detection_starter.STARTER.common(one, scratch))
        assert found["learning_rate"] == f"{rate} * (batch_size / 2) ** 0.5)"
    assert "CompileHook" not in detection_starter.STARTER.hooks(data, plan)
    many = data_of(256, 256, (40, 40), count=30_000)
    assert "CompileHook" in detection_starter.STARTER.hooks(many, plan)
    assert "CompileHook" not in detection_starter.STARTER.hooks(many, PLAN)


@pytest.mark.parametrize(
    ("task", "kind", "side", "batch"),
    [
        (detection_starter, POLYGONS, 128, 8),
        (detection_starter, POLYGONS, 320, 4),
        (detection_starter, POLYGONS, 640, 2),
        (detection_starter, BOXES, 128, 8),
        (rotated_starter, CORNERS, 128, 8),
        (rotated_starter, CORNERS, 1024, 2),
        (segmentation_starter, MASKS, 128, 16),
        (segmentation_starter, MASKS, 512, 4),
    ],
)
def test_small_images_come_in_larger_batches(task, kind, side, batch):
    """Up to four times as many as of 512 px."""
    data = data_of(side, side, (40, 40), kind=kind)
    assert task.STARTER.default_batch(data) == batch


@pytest.mark.parametrize(("count", "often"), [(6, True), (100, True), (150, False)])
def test_images_that_are_seen_often_are_varied(count, often):
    for task, kind, name, value in (
        (rotated_starter, CORNERS, "rotate", "0.5" if often else "0.0"),
        (detection_starter, BOXES, "scales", "(0.75, 1.0)" if often else "(1.0, 1.0)"),
        (detection_starter, POLYGONS, "scales", "(0.75, 1.0)" if often else "(1.0, 1.0)"),
        (segmentation_starter, MASKS, "scales", "(1.0, 1.25)" if often else "(1.0, 1.0)"),
    ):
        data = data_of(256, 256, (40, 40), kind=kind, count=count)
        assert values(task.STARTER.settings(data, PLAN))[name] == value


@pytest.mark.parametrize(
    ("classes", "upright", "from_above"),
    [
        (("car", "left", "bright"), "[0.5, 0.0, 0.0]", "[0.25, 0.25, 0.25]"),
        (("turn-right", "Turn-Left"), "[0.0, 0.0, 0.0]", "[0.0, 0.0, 0.5]"),
    ],
)
def test_images_are_not_mirrored_into_another_class(classes, upright, from_above):
    for task, kind, expected in (
        (detection_starter, BOXES, upright),
        (detection_starter, POLYGONS, upright),
        (segmentation_starter, MASKS, upright),
        (classification_starter, FOLDERS, upright),
        (rotated_starter, CORNERS, from_above),
    ):
        data = data_of(64, 64, (40, 40), kind=kind, classes=classes)
        for image in data.images:
            image.pixels = {0: 9}
        found = {item.name: item for item in task.STARTER.settings(data, PLAN)}
        assert found["flips"].value == expected
        assert ("looks like a" in found["flips"].reason) == ("Turn-Left" in classes)


def test_label_maps_are_trained_in_their_colors(made):
    pipeline = configs.load_config(made["segmentation"][0].config).train_dataloader.dataset.pipeline
    assert [step.type for step in pipeline[2:]] == [
        "RandomResize",
        "RandomCrop",
        "RandomFlip",
        "PackSegInputs",
    ]


@pytest.mark.parametrize(("object_side", "side"), [(13, 128), (12, 128), (8, 192), (3, 256)])
def test_small_rotated_objects_are_enlarged(object_side, side):
    data = data_of(128, 128, (object_side, object_side), kind=CORNERS)
    assert rotated_starter.STARTER.sample_size(data) == (side, side)


def test_turned_images_have_their_boxes_on_the_objects(made):
    config = configs.load_config(made["rotated"][0].config)
    data = config.train_dataloader.dataset
    turn = next(step for step in data.pipeline if step.type == "RandomRotate")
    assert turn.prob == 0.5
    turn.prob = 1.0
    init_default_scope("mmrotate")
    dataset = DATASETS.build(data)
    np.random.seed(0)
    found = 0
    for sample in (dataset[index] for index in range(len(dataset))):
        objects = sample["data_samples"].gt_instances
        for (x, y, *_), label in zip(objects.bboxes.tensor.tolist(), objects.labels, strict=True):
            pixel = sample["inputs"][:, int(y), int(x)].int()
            color = torch.tensor(sets.OBJECT_COLORS[sets.CLASSES.index(config.classes[label])])
            assert (pixel - color).abs().max() < 40
            found += 1
    assert found >= 6


@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("l1", None),
        pytest.param("s2", None, marks=pytest.mark.slow),
        pytest.param("l1", own_data.SCRATCH, marks=pytest.mark.slow),
        pytest.param("s2", own_data.SCRATCH, marks=pytest.mark.slow),
    ],
)
def test_other_variants(made, arch, weights, tmp_path):
    """The config builds the network of the variant, with the neck that fits."""
    from mmengine.registry import MODELS, init_default_scope

    for task, (_, _, root) in made.items():
        out = tmp_path / f"{task}.py"
        make(root, out, arch=arch, weights=weights)
        config = configs.load_config(out)
        if weights is None:
            assert config.model.backbone.init_cfg.checkpoint.endswith(f"_{arch}.snap_dist_in1k")
        configs.drop_pretrained(config.model)
        init_default_scope(config.default_scope)
        config.model.backbone.update(
            arch=dataclasses.asdict(own_data.find_arch(arch).architecture)
            | dict(depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1), mlp_ratios=4)
        )
        model = MODELS.build(config.model).eval()
        with torch.no_grad():
            levels = model.extract_feat(torch.zeros(1, 3, 64, 64))
        assert len(levels) in (4, 5)


# --- tiles ---------------------------------------------------------------------------------------


def test_huge_images_of_small_objects_are_cut(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    image = np.zeros((2400, 3200, 3), np.uint8)
    content = dict(categories=[dict(id=1, name="ant")], images=[], annotations=[])
    for number in range(5):
        cv2.imwrite(str(root / f"{'abcde'[number]}.jpg"), image)
        content["images"].append(
            dict(id=number, file_name=f"{'abcde'[number]}.jpg", width=3200, height=2400)
        )
        for x, y in ((100, 100), (790, 300), (3170, 2380)):
            outline = [x, y, x + 12, y, x + 12, y + 12, x, y + 12]
            content["annotations"].append(
                dict(
                    id=len(content["annotations"]) + 1,
                    image_id=number,
                    category_id=1,
                    bbox=[x, y, 12, 12],
                    segmentation=[outline],
                )
            )
    (root / "labels.json").write_text(json.dumps(content))
    result, report = make(root, tmp_path / "a.py")
    assert "warning" not in report
    assert result.errors == 0 and "tiles of 800 px" in report and "--window 800" in report
    entries = json.loads((tmp_path / "a_data" / "train.json").read_text())
    by_id = {entry["id"]: entry["file_name"] for entry in entries["images"]}
    found = set()
    for entry in entries["annotations"]:
        name = Path(by_id[entry["image_id"]])
        x, y = (int(part) for part in name.stem.split("__800__")[1].split("___"))
        box = entry["bbox"]
        assert 0 <= box[0] and box[0] + box[2] <= 800
        found.add((x + box[0], y + box[1], box[2], box[3]))
        tile = cv2.imread(str(tmp_path / "a_data" / "tiles" / name))
        assert tile.shape == (800, 800, 3)
    # 790 is cut by the border of a tile, and whole in the next one.
    assert found >= {(100, 100, 12, 12), (790, 300, 12, 12), (3170, 2380, 12, 12)}
    assert found - {(100, 100, 12, 12), (790, 300, 12, 12), (3170, 2380, 12, 12)} <= {
        (790, 300, 10, 12)
    }


def test_huge_scenes_of_rotated_boxes_are_cut(tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labelTxt").mkdir()
        cv2.imwrite(str(root / split / f"images/{split}1.png"), np.zeros((1100, 2000, 3), np.uint8))
        line = "1500 900 1520 900 1520 910 1500 910 boat 0\n"
        (root / split / f"labelTxt/{split}1.txt").write_text(line)
    result, report = make(root, tmp_path / "a.py")
    config = configs.load_config(result.config)
    assert result.errors == 0 and "patches of 1024 px" in report and config.size == (1024, 1024)
    assert len(list((tmp_path / "a_data/train/patches/images").iterdir())) == 6


# --- images of one name in several folders -------------------------------------------------------

CAMERAS = ("b/north", "b/south", "c/north")


def write_cameras(root, size, suffixes=(".png",) * 3):
    """Images ``0.*`` of one size in three folders, each with one gray and one object of its own."""
    images = []
    for index, (folder, suffix) in enumerate(zip(CAMERAS, suffixes, strict=True)):
        path = root / "images" / folder / f"0{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((size, size, 3), 50 * (index + 1), np.uint8))
        item = LabeledObject(0, (100 + 10 * index, 20, 9, 9))
        images.append(LabeledImage(path, size, size, [item], split="train"))
    return LabeledData("COCO", root, BOXES, ("ant",), images)


def test_names_of_files_are_unique(tmp_path):
    names = ("a/1.jpg", "a/1.png", "b/1.jpg", "x/b_1.jpg", "b_1/1.jpg", "c/2.jpg")
    images = [LabeledImage(tmp_path / name, 8, 8) for name in names]
    found = starter.file_names([*images, images[0]], tmp_path)
    assert list(found) == [tmp_path / name for name in names]
    assert list(found.values()) == ["a_1", "a_1_", "b_1", "b_1_", "b_1_1", "2"]


def test_tiles_of_images_of_one_name(tmp_path):
    """Each tile has the pixels and the objects of its own image."""
    data = write_cameras(tmp_path, 1000, (".png", ".bmp", ".png"))
    tiles = detection_starter.STARTER.prepare(data, tmp_path / "out").images
    assert len({tile.path for tile in tiles}) == len(tiles) == 3 * 4
    content = json.loads((tmp_path / "out" / "train.json").read_text())
    by_id = {entry["id"]: entry["file_name"] for entry in content["images"]}
    assert len(set(by_id.values())) == 12
    for entry in content["annotations"]:
        pixels = cv2.imread(str(tmp_path / "out" / "tiles" / by_id[entry["image_id"]]))
        assert pixels[0, 0, 0] == 50 * (1 + (entry["bbox"][0] - 100) / 10)
    assert len(content["annotations"]) == 3


def test_masks_of_images_of_one_name(tmp_path):
    """Each image has the mask of its own objects, however deep its folder is."""
    data = write_cameras(tmp_path, 200)
    for image, folder in zip(data.images, CAMERAS, strict=True):
        deep = tmp_path / "images" / folder / "x" / "y" / image.path.name
        deep.parent.mkdir(parents=True)
        image.path = image.path.rename(deep)
    written = segmentation_starter.STARTER.prepare(data, tmp_path / "out").images
    for index, image in enumerate(written):
        mask = cv2.imread(str(image.mask), cv2.IMREAD_UNCHANGED)
        assert np.flatnonzero(mask.any(0)).tolist() == [*range(100 + 10 * index, 109 + 10 * index)]


@pytest.mark.parametrize("size", [200, 1100])
def test_rotated_boxes_of_images_of_one_name(tmp_path, size):
    """Whole images and patches have their own label files."""
    from mmeformer.rotated.dota import list_images, list_labels, read_labels

    data = write_cameras(tmp_path, size)
    rotated_starter.STARTER.prepare(data, tmp_path / "out")
    folder, images, labels = tmp_path / "out" / "train", "images.txt", "labels"
    if rotated_starter.is_cut(data):
        images, labels = "patches/images", "patches/annfiles"
    found = list_images(folder / images)
    files = list_labels(folder / labels)
    assert found.keys() == files.keys() and len(found) == (3 if size == 200 else 12)
    objects = {name: read_labels(path) for name, path in files.items()}
    lefts: dict[int, float] = {}
    for name, path in found.items():
        gray = int(cv2.imread(str(path))[0, 0, 0])
        for item in objects[name]:
            # The first patch has it furthest to the right.
            lefts[gray] = max(lefts.get(gray, 0), item.polygon[:, 0].min())
    assert lefts == {50: 100, 100: 110, 150: 120}


# --- batch by trial ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "free", "limit", "batch"),
    [(10, 1000, 32, 32), (10, 110, 32, 8), (10, 1000, 5, 4), (200, 110, 32, 1), (60, 130, 32, 1)],
)
def test_largest_batch(each, free, limit, batch):
    tried = []

    def peak(size):
        tried.append(size)
        if size * each > 1.5 * free:
            raise torch.OutOfMemoryError("full")
        return 20 + size * each

    assert trial.largest_batch(peak, free, limit) == batch
    assert max(tried, default=1) <= limit and len(tried) <= 4


def test_growth_that_the_first_steps_do_not_tell():
    """A step that needs more than two small ones promised is halved."""
    assert trial.largest_batch(lambda size: size**2, free=100, limit=32) == 8


@pytest.mark.parametrize(
    ("text", "small"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_missing_memory_makes_a_batch_smaller(text, small):
    def peak(size):
        if size > 2:
            raise RuntimeError(text)
        return size

    if small:
        assert trial.largest_batch(peak, free=100, limit=8) == 2
    else:
        with pytest.raises(RuntimeError, match="must match"):
            trial.largest_batch(peak, free=100, limit=8)


def test_trial_steps(made, tmp_path):
    """The real step of a trial, on the CPU."""
    config = tiny.network("detection", str(made["detection"][0].config))
    config.optim_wrapper.type = "AmpOptimWrapper"
    found = trial.Trial(config, torch.device("cpu"))
    before = [parameter.clone() for parameter in found.model.parameters()]
    found.fill_optimizer()
    trained = [parameter for parameter in found.model.parameters() if parameter.requires_grad]
    assert all("exp_avg" in found.optimizer.optimizer.state[item] for item in trained)
    assert all(item.grad is None or not item.grad.any() for item in trained)
    assert math.isfinite(found.step(3)) and found.images == len(
        json.loads(
            (made["detection"][0].config.with_name("my_detection_data") / "train.json").read_text()
        )["images"]
    )
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before, found.model.parameters(), strict=True)
        if new.requires_grad
    ]
    assert sum(changed) > len(changed) / 2
    assert config.optim_wrapper.type == "AmpOptimWrapper"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "about 1 minute"),
        (1200, "about 20 minutes"),
        (3 * 3600, "about 3 hours"),
        (200_000, "about 2 days"),
    ],
)
def test_durations(seconds, text):
    assert own_data.duration(seconds) == text


@pytest.mark.slow
@pytest.mark.parametrize("task", WRITERS)
def test_train_on_a_folder(task, tmp_path, monkeypatch):
    """``mmeformer train DATA`` with the whole network, from scratch, for two iterations."""
    from mmeformer.commands.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_data, "default_checkpoint", lambda variant: None)
    root = WRITERS[task](tmp_path / "data")
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    if task == "segmentation":
        options = ["train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    assert main(["train", str(root), "--cfg-options", *options]) == 0
    assert list((tmp_path / "work_dirs" / "data").glob("*_*.pth"))
    # The second time, the config is there.
    assert main(["train", str(root)]) == 1


@pytest.mark.slow
def test_several_processes_train_on_a_folder(tmp_path, monkeypatch, capfd):
    """The config is made once, before they start, with the options of ``init``."""
    from mmeformer.commands.__main__ import main

    monkeypatch.chdir(tmp_path)
    # The test's own process has it set; what it starts has not.
    monkeypatch.setattr(signals, "leave_on_signals", lambda: None)
    root = sets.write_masks(tmp_path / "data", values={1: 7, 2: 3})
    train = ["train", str(root), "--gpus", "2", "--out", "b.py"]
    options = ["--weights", "none", "--cfg-options", "train_cfg.val_interval=9"]
    assert main([*train, *options, "train_cfg.max_iters=1"]) == 0
    text = capfd.readouterr().out
    assert text.count("wrote ") == text.count("no GPU: 2 processes on the CPU") == 1
    assert (tmp_path / "work_dirs/b/iter_1.pth").is_file()
    assert main([*train, "--resume", *options, "train_cfg.max_iters=2"]) == 0
    text = capfd.readouterr().out
    assert "wrote " not in text and "resumed epoch: 0, iter: 1" in text
    assert main(train) == 1
    error = capfd.readouterr().err
    assert f"error: {tmp_path / 'b.py'} exists; train it" in error and error.count("\n") == 1


def test_waiting_is_announced(made):
    text = made["detection"][1]
    places = [text.index(part) for part in ("wrote ", "checking what", "timing a", "0.5 s: about")]
    assert places == sorted(places)


def test_json_is_parsed_once(tmp_path, monkeypatch):
    """COCO's files can be half a gigabyte."""
    root = WRITERS["detection"](tmp_path / "data")
    parsed: list[Path] = []

    def parse(path):
        parsed.append(path)
        return json.loads(path.read_text())

    for module in (coco, annotations):
        monkeypatch.setattr(module, "read_json", parse)
    data = read_folder(root, Options())
    assert data.format == coco.NAME and len(parsed) == len(set(parsed)) > 0


def test_seconds_of_a_step(made):
    config = tiny.network("rotated", str(made["rotated"][0].config))
    assert 0 < trial.measure_seconds(config) < 60


def test_options_answer_questions(tmp_path):
    """Masks beside XML files of boxes: the task chooses the masks."""
    root = sets.write_voc(tmp_path / "data")
    masks = sets.write_masks(tmp_path / "masks") / "masks"
    (root / "SegmentationClass").mkdir()
    for path in masks.rglob("*.png"):
        shutil.copy(path, root / "SegmentationClass" / path.name)
    request = own_data.Request(root, options=Options(), task="segmentation")
    assert own_data._options(request, root).format == MASKS
    assert own_data._options(dataclasses.replace(request, task=None), root).format is None
