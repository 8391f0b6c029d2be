# SPDX-License-Identifier: Apache-2.0
"""Bad input to every command line: one readable error, exit status 1 or 2, nothing half-written."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from helpers import load_script
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from mmeformer import configs, images
from mmeformer.commands import cli
from mmeformer.errors import CheckpointError, TrainingError, UserError
from mmeformer.paths import tools_dir

pytestmark = pytest.mark.usefixtures("quiet_logging")

OUTPUTS = {".pth", ".pkl", ".png", ".onnx", ".safetensors"}


def command(name):
    """The ``main`` of a command line."""
    return load_script(tools_dir() / f"{name}.py").main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with configs and weights of tiny models, good ones and bad."""
    folder = tmp_path_factory.mktemp("cli")
    for task, make in tiny.TASKS.items():
        config = make(folder, iterations=1)
        config.dump(folder / f"{task}.py")
        init_default_scope(config.default_scope)
        configs.drop_pretrained(config.model)
        weights = MODELS.build(config.model).state_dict()
        torch.save(dict(meta={}, state_dict=weights), folder / f"{task}.pth")
    other = tiny.detection(folder)
    other.model.backbone.arch = dict(tiny.ARCH, widths=(8, 16, 24, 40))
    other.model.neck.in_channels = [8, 16, 24, 40]
    other.dump(folder / "other.py")
    init_default_scope("mmdet")
    weights = MODELS.build(other.model).state_dict()
    torch.save(dict(meta={}, state_dict=weights), folder / "other.pth")
    for name, change in (("nan", lambda x: x * torch.nan), ("whole", lambda x: x.long())):
        weights = dict(torch.load(folder / "detection.pth", weights_only=True)["state_dict"])
        weights["rpn_head.rpn_conv.bias"] = change(weights["rpn_head.rpn_conv.bias"])
        torch.save(dict(meta={}, state_dict=weights), folder / f"{name}.pth")
    torch.save(dict(state_dict=[1, 2]), folder / "list.pth")
    whole = (folder / "detection.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "picture.pth").write_bytes(next(folder.rglob("*.png")).read_bytes())
    (folder / "syntax.py").write_text("model = dict(\n")
    (folder / "text.txt").write_text("hello")
    (folder / "clip.mp4").write_text("frames")
    (folder / "name.py").write_text("_base_ = 'gone.py'\n")
    (folder / "bare.py").write_text("model = dict()\n")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "a.png"), picture)
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(cv2.imencode(".jpg", picture)[1].tobytes()[:3000])
    return folder


WORK = "--work-dir {out}/work"
# Command, arguments ({p}: the folder above, {out}: one for output), and what the error says.
CASES = [
    ("train", "gone.py", "config gone.py does not exist"),
    ("train", "mask-rcnn_efficientformerv2-s0_1x_coco.py", "did you mean configs/detection/mask"),
    ("train", "{p}/syntax.py " + WORK, "syntax.py cannot be read: .*never closed"),
    ("train", "{p}/name.py " + WORK, "name.py cannot be read: .*gone.py"),
    ("train", "{p}/text.txt " + WORK, "text.txt cannot be read: Only py"),
    ("train", "{p} " + WORK, "has labels in several formats: .*--format"),
    ("train", "{p}/aerial/train/images " + WORK, "no labels that are known"),
    (
        "train",
        "{p}/bare.py " + WORK,
        "bare.py is not a training config: missing .*train_data",
    ),
    ("train", "{p}/segmentation.py --work-dir {p}/text.txt/work", "text.txt"),
    ("train", "{p}/segmentation.py --resume {p}/gone.pth " + WORK, "gone.pth does not exist"),
    ("train", "{p}/segmentation.py --resume {p}/truncated.pth " + WORK, "truncated.pth is damaged"),
    ("train", "{p}/segmentation.py --resume {p}/segmentation.pth " + WORK, "has no optimizer"),
    (
        "train",
        "{p}/segmentation.py " + WORK + " --cfg-options model.backbone.type=Nope",
        "model.backbone.type=Nope: Nope is not in the model registry",
    ),
    (
        "train",
        "{p}/segmentation.py " + WORK + " --cfg-options model.backbone.nope=1",
        "model.backbone.nope=1: mmeformer.EfficientFormerV2 has no nope; it has arch, ",
    ),
    (
        "train",
        "{p}/detection.py " + WORK + " --cfg-options train_dataloader.dataset.data_root=/gone",
        "/gone/annotations/instances_train2017.json does not exist",
    ),
    (
        "train",
        "{p}/detection.py " + WORK + " --cfg-options load_from={p}/other.pth",
        "have another shape",
    ),
    ("train", "{p}/detection.py " + WORK + " --cfg-options load_from={p}/nan.pth", "NaN"),
    ("train", "{p}/detection.py --launcher teleport", "invalid choice"),
    ("train", "{p}/detection.py --launcher slurm " + WORK, "only in a Slurm job"),
    ("train", "{p}/detection.py --cfg-options nonsense", "'nonsense' is not KEY=VALUE"),
    ("train", "{p}/detection.py --cfg-options custom_hooks=[dict(type='X')]", "one by one"),
    ("train", "{p}/detection.py --launcher pytorch", "use --gpus N in place of it"),
    ("train", "{p}/detection.py --launcher slurm --gpus 2", "leave out --launcher slurm"),
    ("train", "{p}/detection.py --gpus none", "--gpus: none must be a whole number from 1 on"),
    ("train", "{p}/maskz", "neither a config nor a folder {p}/maskz; did you mean {p}/masks[?]"),
    ("train", "{p}/maskz/images/trainin", "did you mean {p}/masks/images/training[?]"),
    ("train", "{p}/nothing/like/it", "neither a config nor a folder {p}/nothing/like/it$"),
    ("train", "{p}/detectoin.py", "{p}/detectoin.py does not exist; did you mean {p}/detection.py"),
    ("train", "{p}/detection.py --format coco", "--format is for a folder of data, and .* none"),
    ("train", "{p}/detection.py --skip-bad", "--skip-bad is for a folder of data, and .* none"),
    ("train", "{p} --task rotated --format labelme " + WORK, "labelme"),
    (
        "export",
        "{p}/segmentation.py {p}/segmentation.pth --to onnx --size 64 64 --out {out}/a.onnx "
        "--max-drop 2",
        "--max-drop is for 8 bits",
    ),
    (
        "export",
        "{p}/segmentation.py {p}/segmentation.pth --to onnx --size 64 64 --out {out}/a.onnx "
        "--int8 {p}/clip.mp4",
        "clip.mp4: no images there; videos are not used",
    ),
    (
        "train",
        "{p}/detection.py " + WORK + " --cfg-options default_hooks.checkpoint.intervall=2",
        "CheckpointHook has no setting intervall",
    ),
    ("train", "{p}/detection.py --cfg-options a=[1,(2]", "argument --cfg-options: .*brackets"),
    (
        "train",
        "{p}/detection.py --resume https://localhost:1/a.pth " + WORK,
        "https://localhost:1/a.pth could not be downloaded",
    ),
    ("test", "{p}/gone.py {p}/detection.pth", "gone.py does not exist"),
    ("test", "{p}/detection.py {p}/gone.pth " + WORK, "gone.pth does not exist"),
    ("test", "{p}/detection.py {p}/empty.pth " + WORK, "empty.pth is empty"),
    ("test", "{p}/detection.py {p}/truncated.pth " + WORK, "truncated.pth is damaged"),
    ("test", "{p}/detection.py {p}/page.pth " + WORK, "page.pth is a web page"),
    ("test", "{p}/detection.py {p}/picture.pth " + WORK, "picture.pth is neither"),
    (
        "test",
        "{p}/detection.py {p}/other.pth " + WORK,
        "other.pth does not fit this",
    ),
    ("test", "{p}/detection.py {p}/segmentation.pth " + WORK, "segmentation.pth does not fit this"),
    (
        "test",
        "{p}/detection.py {p}/nan.pth " + WORK,
        r"nan.pth: tensor rpn_head\.rpn_conv\.bias has 32 of 32 values that are NaN",
    ),
    ("test", "{p}/detection.py {p}/whole.pth " + WORK, "whole.pth: tensor .* is of type int64"),
    ("test", "{p}/detection.py {p}/list.pth " + WORK, "list.pth has no state dict"),
    ("test", "{p}/rotated.py {p}/detection.pth " + WORK, "detection.pth does not fit this"),
    ("test", "{p}/detection.py {p}/detection.pth --out {out}/a.txt " + WORK, "must end in .pkl"),
    (
        "test",
        "{p}/detection.py {p}/detection.pth --out {p}/text.txt/a.pkl " + WORK,
        "text.txt",
    ),
    (
        "test",
        "{p}/detection.py {p}/detection.pth --show-dir {p}/text.txt/pictures " + WORK,
        "text.txt",
    ),
    ("convert_checkpoint", "{p}/gone.pth {out}/a.pth", "gone.pth does not exist"),
    ("convert_checkpoint", "{p}/empty.pth {out}/a.pth", "empty.pth is empty"),
    ("convert_checkpoint", "{p}/truncated.pth {out}/a.pth", "truncated.pth is damaged"),
    ("convert_checkpoint", "{p}/detection.pth {out}/a.pth", "published variants"),
    ("convert_checkpoint", "{p}/detection.pth {out}/a.doc", "must end in one of"),
    ("convert_checkpoint", "{p}/detection.pth {p}/other.pth", "exists: .*--force"),
    ("check_dataset", "gone.py", "config gone.py does not exist"),
    ("check_dataset", "{p}/bare.py", "has no train_dataloader"),
    ("check_dataset", "{p}/detection.py --first -1", "--first -1 must be at least 1"),
    ("check_dataset", "{p}/detection.py --split tset", "invalid choice"),
    ("check_dataset", "{p}/detection.py --out {p}/text.txt/out", "text.txt"),
    (
        "check_dataset",
        "{p}/detection.py --cfg-options train_dataloader.dataset.ann_file=gone.json",
        "gone.json does not exist",
    ),
    ("quickstart", "dancing", "invalid choice: 'dancing'"),
    ("export", "{p}/gone.py {p}/detection.pth --to onnx --dynamic --out {out}/a.onnx", "gone.py"),
    (
        "export",
        "{p}/detection.py {p}/truncated.pth --to onnx --dynamic --out {out}/a.onnx",
        "truncated.pth is damaged",
    ),
    (
        "export",
        "{p}/detection.py {p}/nan.pth --to onnx --dynamic --out {out}/a.onnx",
        "nan.pth: tensor .* NaN",
    ),
    ("split_dota", "{p}/gone {out}/patches", "gone"),
    ("split_dota", "{p}/aerial/train {out}/patches --labels annfiles --overlap -5", "overlap"),
    (
        "split_dota",
        "{p}/aerial/train {p}/text.txt/patches --labels annfiles --workers 1",
        "text.txt/patches/images: Not a directory",
    ),
    ("predict", "{p}/gone.py {p}/detection.pth {p}/a.png --out {out}", "gone.py does not exist"),
    ("predict", "{p}/detection.py {p}/other.pth {p}/a.png --out {out}", "other.pth"),
    ("predict", "{p}/detection.py {p}/segmentation.pth {p}/a.png --out {out}", "segmentation.pth"),
    ("predict", "{p}/detection.py {p}/truncated.pth {p}/a.png --out {out}", "truncated.pth"),
    ("predict", "{p}/detection.py {p}/nan.pth {p}/a.png --out {out}", "nan.pth: tensor .* NaN"),
    ("predict", "{p}/detection.py {p}/detection.pth {p}/gone.png --out {out}", "gone.png"),
    ("predict", "{p}/detection.py {p}/detection.pth {p}/text.png --out {out}", "text.png"),
    ("predict", "{p}/rotated.py {p}/rotated.pth {p}/empty.png --out {out}", "empty.png"),
    ("predict", "{p}/segmentation.py {p}/segmentation.pth {p}/cut.jpg --out {out}", "cut.jpg"),
    ("predict", "{p}/detection.py {p}/detection.pth {p}/a.png --score-thr -1 --out {out}", "-1"),
    ("predict", "{p}/detection.py {p}/detection.pth {p}/a.png --out {p}/text.txt/out", "text.txt"),
    ("predict", "{p}/detection.py {p}/detection.pth {p}/a.png --window -5 --out {out}", "window"),
    ("profile", "{p}/gone.py", "gone.py does not exist"),
]


def call(main, argv):
    try:
        return main(argv)
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.mark.parametrize(
    ("name", "arguments", "message"), CASES, ids=[f"{name} {argv}" for name, argv, _ in CASES]
)
def test_bad_input(place, tmp_path, capfd, name, arguments, message):
    before = {path for path in place.rglob("*") if path.suffix in OUTPUTS}
    argv = arguments.format(p=place, out=tmp_path / "out").split()
    assert call(command(name), argv) in (1, 2)
    output, error = capfd.readouterr()
    # argparse puts the command's name before it.
    assert len(re.findall(r"^(?:\S+: )?error: ", error, re.MULTILINE)) == 1, error
    # Where one of many inputs is bad, the output names it and the error counts them.
    message = message.replace("{p}", str(place))
    assert re.search(message, (output + error if name == "predict" else error).strip()), error
    assert "Traceback" not in output + error
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in OUTPUTS]
    assert {path for path in place.rglob("*") if path.suffix in OUTPUTS} == before


def test_debug_shows_where(place, capfd):
    assert command("train")([str(place / "gone.py"), "--debug"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: config")


def test_as_a_process(place):
    """The exit status reaches the shell."""
    result = subprocess.run(
        [sys.executable, tools_dir() / "check_dataset.py", place / "gone.py"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 1
    assert "gone.py does not exist" in result.stderr and "Traceback" not in result.stderr


class TestRun:
    class Arguments:
        debug = False

    def test_work_in_progress_keeps_its_traceback(self, capsys):
        def run_iter(args):
            raise ValueError("a bug in someone's model")

        assert cli.run(run_iter, self.Arguments) == 1
        error = capsys.readouterr().err
        assert "Traceback" in error and error.endswith("error: a bug in someone's model\n")

    @pytest.mark.parametrize("kind", [UserError, CheckpointError, TrainingError])
    def test_errors_for_users_have_no_traceback(self, capsys, kind):
        def run_iter(args):
            raise kind("the loss is not finite")

        assert cli.run(run_iter, self.Arguments) == 1
        assert capsys.readouterr().err == "error: the loss is not finite\n"

    def test_own_warnings_are_one_line(self, monkeypatch, capfd):
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

        def work(args):
            for module in (images, np):
                text = warnings.formatwarning("a.png is dark", UserWarning, module.__file__, 3)
                print(text, end="")

        assert cli.run(work, self.Arguments) == 0
        first, second, *_ = capfd.readouterr().out.splitlines()
        assert first == "warning: a.png is dark"
        assert second.endswith("__init__.py:3: UserWarning: a.png is dark")

    def test_statuses(self):
        assert cli.run(lambda args: None, self.Arguments) == 0
        assert cli.run(lambda args: 3, self.Arguments) == 3

        def interrupt(args):
            raise KeyboardInterrupt

        assert cli.run(interrupt, self.Arguments) == 130

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (ValueError("sentence"), "sentence"),
            (KeyError("a\nb"), "KeyError: a\nb (more with --debug)"),
            (TypeError(), "TypeError: no message (more with --debug)"),
            (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
            (
                TrainingError(
                    "Caught X in worker.\nOriginal Traceback (...)\na.TrainingError: why"
                ),
                "why",
            ),
        ],
    )
    def test_texts(self, error, text):
        assert cli.one_text(error) == text


def odd_images():
    """Name -> function that writes an unusual but valid image."""
    gray = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    return {
        "gray.png": lambda path: Image.fromarray((gray >> 4).astype(np.uint8)).save(path),
        "rgba.png": lambda path: Image.new("RGBA", (64, 64), (9, 9, 9, 4)).save(path),
        "deep.png": lambda path: Image.fromarray(gray << 4).save(path),
        "cmyk.jpg": lambda path: Image.new("CMYK", (64, 64), (9, 9, 9, 4)).save(path),
        "pixel.png": lambda path: Image.new("RGB", (1, 1)).save(path),
        "strip.png": lambda path: Image.new("RGB", (20000, 20)).save(path),
    }


@pytest.fixture
def rotated(place, tmp_path):
    """A config of rotated detection whose training images are a copy."""
    root = Path(shutil.copytree(place / "aerial", tmp_path / "aerial"))
    config = configs.load_config(place / "rotated.py")
    config.train_dataloader.dataset.data_root = str(root)
    config.dump(tmp_path / "config.py")
    return tmp_path / "config.py", root / "train/images"


def test_odd_images_are_accepted(rotated, tmp_path, capfd):
    config, images = rotated
    for name, write in odd_images().items():
        write(images / name)
    out = tmp_path / "out"
    assert command("check_dataset")([str(config), "--split", "train", "--out", str(out)]) == 0
    output = " ".join(capfd.readouterr().out.split())
    assert "deep image" in output and "0 errors" in output
    from mmeformer.training.loading import LoadImageFromFile

    for name in odd_images():
        loaded = LoadImageFromFile()(dict(img_path=str(images / name)))["img"]
        assert loaded.dtype == np.uint8 and loaded.ndim == 3 and loaded.shape[2] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"nonsense", "cannot be read"), (None, "is truncated")],
)
def test_bad_images_are_named(rotated, tmp_path, capfd, content, message):
    config, images = rotated
    path = images / "000003.png"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    argv = [str(config), "--split", "train", "--out", str(tmp_path / "out")]
    assert command("check_dataset")(argv) == 1
    assert message in " ".join(capfd.readouterr().out.split())
    # Training would not begin either: one image of eight is too many.
    assert command("train")([str(config), "--work-dir", str(tmp_path / "work")]) == 1
    error = capfd.readouterr().err
    assert "000003.png" in error and message in error and "Traceback" not in error
    assert cv2.imread(str(images / "000000.png")) is not None


def test_processes_of_torchrun_need_a_launcher(place, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("train")([str(place / "detection.py"), "--work-dir", str(tmp_path)]) == 1
    assert "one of 2 processes, which would all do the same: add" in capsys.readouterr().err
