# SPDX-License-Identifier: Apache-2.0
"""The command that checks data sets, from config to table and pictures."""

import importlib
import importlib.util
import json

import cv2
import pytest
import tiny
from helpers import load_script
from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmengine.registry import DATASETS

from mmeformer.checks.dataset import checked_datasets_of, datasets_of
from mmeformer.checks.interface import CheckedDataset
from mmeformer.paths import tools_dir
from mmeformer.tasks import TASKS

IMAGES = {
    "detection": "coco/train2017",
    "segmentation": "masks/images/training",
    "rotated": "aerial/train/images",
}


pytestmark = pytest.mark.usefixtures("quiet_logging")


@pytest.fixture(scope="module")
def command():
    return load_script(tools_dir() / "check_dataset.py").main


@pytest.fixture
def folder(tiny_copy):
    return tiny_copy


def write_config(folder, task):
    path = folder / f"{task}.py"
    tiny.TASKS[task](folder).dump(path)
    return str(path)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_valid_data(folder, command, capsys, task):
    config = write_config(folder, task)
    assert command([config, "--full", "--out", str(folder / "out")]) == 0
    output = capsys.readouterr().out
    assert output.count("0 errors") == 2
    # 8 and 2 samples, in rows of four.
    drawn = cv2.imread(str(folder / "out/train.png"))
    assert drawn.shape == (640, 1280, 3)
    assert cv2.imread(str(folder / "out/val.png")).shape == (320, 640, 3)
    # The first sample differs from its image by the colors of the labels.
    image = cv2.imread(str(folder / IMAGES[task] / "000000.png"))
    plain = cv2.resize(image, (320, 320), interpolation=cv2.INTER_NEAREST)
    assert (cv2.absdiff(drawn[:320, :320], plain).max(axis=2) > 40).mean() > 0.01


def test_evaluators_that_read_another_file(folder, command, capsys):
    config = tiny.detection(folder)
    for name, message in (("train2017", "its data set"), ("gone", "does not exist")):
        config.val_evaluator.ann_file = str(folder / f"coco/annotations/instances_{name}.json")
        config.dump(folder / "config.py")
        arguments = [str(folder / "config.py"), "--out", str(folder / "out")]
        assert command(arguments) == 1
        output = " ".join(capsys.readouterr().out.split())
        assert "1 errors" in output and "evaluator" in output and message in output


def test_errors(folder, command, capsys):
    config = write_config(folder, "detection")
    path = folder / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:5]:
        annotation["bbox"][2] = -4
    path.write_text(json.dumps(content))
    (folder / "coco/train2017/000002.png").write_bytes(b"")
    out = folder / "out"
    assert command([config, "--split", "train", "--out", str(out), "--first", "2"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "inverted box" in output and "and 3 more" in output
    assert "6 errors" in output and (out / "train.png").is_file()


@pytest.mark.parametrize("task", tiny.TASKS)
def test_unreadable_labels_are_findings_not_crashes(folder, command, capsys, task):
    config = write_config(folder, task)
    path = (
        folder
        / {
            "detection": "coco/annotations/instances_train2017.json",
            "segmentation": "masks/annotations/training/000000.png",
            "rotated": "aerial/train/annfiles/000000.txt",
        }[task]
    )
    path.write_bytes(b"\x00\xff nonsense")
    assert command([config, "--split", "train", "--out", str(folder / "out")]) == 1
    captured = capsys.readouterr()
    assert "1 errors" in captured.out and "Traceback" not in captured.err


def test_concatenated_data_sets_are_all_checked(folder):
    config = tiny.rotated(folder)
    one = config.train_dataloader.dataset
    config.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[one, dict(one)])
    assert len(datasets_of(config, "train")) == 2


LIBRARIES = {
    "detection": "mmdet.CocoDataset",
    "segmentation": "BaseSegDataset",
    "rotated": "mmrotate.DOTADataset",
    "classification": "mmpretrain.CustomDataset",
}


@pytest.mark.parametrize("task", tiny.all_tasks())
def test_data_sets_of_libraries_are_checked_by_ours(tmp_path, task):
    config = tiny.ALL_TASKS[task](tmp_path)
    checked = type(datasets_of(config, "train")[0])
    config.train_dataloader.dataset.type = LIBRARIES[task]
    (plain,), (ours,) = datasets_of(config, "train"), checked_datasets_of(config, "train")
    assert not isinstance(plain, CheckedDataset) and type(ours) is checked
    assert not ours.findings()


def test_data_sets_of_users_have_no_checks(folder):
    class OwnDataset(MMDetCocoDataset):
        """Reads what only its author knows."""

    config = tiny.detection(folder)
    config.train_dataloader.dataset.type = OwnDataset
    assert type(datasets_of(config, "train")[0]) is OwnDataset
    with pytest.raises(ValueError, match="OwnDataset .* be checked: use mmeformer.CocoDataset$"):
        checked_datasets_of(config, "train")


@pytest.mark.parametrize("task", TASKS)
def test_data_sets_of_tasks_have_checks(task):
    for library in TASKS[task].libraries:
        pytest.importorskip(library, reason=f"the extra `{task}` is not installed")
    importlib.import_module(f"mmeformer.{task}")
    names = TASKS[task].datasets
    assert names and all(issubclass(DATASETS.get(name), CheckedDataset) for name in names)
