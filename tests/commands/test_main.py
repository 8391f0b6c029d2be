# SPDX-License-Identifier: Apache-2.0
"""The command ``mmeformer``: help, version, nearest words, completion."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import labeled_sets as sets
import pytest
import yaml

from mmeformer.commands import __main__ as command
from mmeformer.commands import cli, completion
from mmeformer.commands.__main__ import COMMANDS, main, summary
from mmeformer.tasks import TASKS
from mmeformer.version import __version__


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and main([]) == 0 and main(["help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S.*", text, re.MULTILINE) and summary(name)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmeformer {__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mmeformer.commands.__main__ import main; main(['--help']); "
        "print([m for m in ('torch', 'mmengine', 'cv2', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_package_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "mmeformer", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"mmeformer {__version__}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trian", "no command 'trian'; did you mean train?"),
        ("quick-start", "did you mean quickstart?"),
        ("dance", "choose one of init, train, test"),
        ("val", "did you mean test?"),
        ("detect", "did you mean predict?"),
    ],
)
def test_nearest_command(word, message, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("init data --tsak detection", "unrecognized arguments: --tsak; did you mean --task?"),
        ("train data --device 0", "--device; did you mean --gpus?"),
        ("train data --epochs 3", "--epochs; epochs is a line of the config that mmeformer init"),
        ("train --data data", "--data; give its value without it: mmeformer train my_config.py"),
        ("train a.py lr=3", "lr=3; KEY=VALUE follows --cfg-options"),
        ("predict --source a.jpg --weights b.pth", "--source; give its value without it"),
        ("predict a.py b.pth c.jpg --conf 0.5", "did you mean --score-thr?"),
        ("export gone --format onnx", "--format; did you mean --to?"),
        ("export", "required: config, checkpoint, --to, --out; example: mmeformer export work_"),
        ("predict a.onnx photo.jpg", "a.onnx is an exported file, whose config comes before it"),
    ],
)
def test_wrong_arguments_are_one_line_with_the_next_step(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("libGL.so.1: cannot open shared object file"),
            "ImportError: libGL.so.1: cannot open shared object file; install only the OpenCV that",
        ),
        (ModuleNotFoundError("No module named 'timm'"), "'timm'; pip install 'mmeformer[all]'"),
        (ModuleNotFoundError("No module named 'pkg_resources'"), "pip install 'setuptools<81'"),
        (RuntimeError("something else"), "something else; mmeformer doctor names the fix"),
    ],
)
def test_broken_installation_is_one_line_with_the_fix(error, message, monkeypatch, capsys):
    def fail(name):
        raise error

    monkeypatch.setattr(command, "import_module", fail)
    assert main(["train", "a.py"]) == 1
    text = capsys.readouterr().err
    assert message in text and text.startswith("error: this installation does not work: ")
    assert text.count("\n") == 1
    with pytest.raises(type(error)):
        main(["train", "a.py", "--debug"])


def test_help_of_a_command_by_its_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["help", "init"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: mmeformer init ")


class TestConfigAndCheckpoint:
    """A work directory, or a checkpoint in it, stands for both."""

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "runs" / "nuclei"
        folder.mkdir(parents=True)
        for name in ("nuclei.py", "epoch_1.pth", "best_coco_bbox_mAP_epoch_1.pth"):
            (folder / name).touch()
        return folder

    @pytest.mark.parametrize(
        ("given", "checkpoint"),
        [
            ("{}", "best_coco_bbox_mAP_epoch_1.pth"),
            ("{}/epoch_1.pth", "epoch_1.pth"),
            ("{}/nuclei.py {}", "best_coco_bbox_mAP_epoch_1.pth"),
            ("{} {}/epoch_1.pth", "epoch_1.pth"),
            ("{} {}/a.onnx", "a.onnx"),
            ("{}/nuclei.py {}/epoch_1.pth", "epoch_1.pth"),
        ],
    )
    def test_both_are_found(self, folder, given, checkpoint):
        words = [word.format(folder) for word in given.split()]
        args = cli.parse(_parser(), [*words, "--flag"], model=True)
        assert args.config == str(folder / "nuclei.py")
        assert args.checkpoint == str(folder / checkpoint)

    def test_folders_that_are_none(self, folder, capsys):
        (folder / "last_checkpoint").touch()
        for path, message in (
            (folder.parent, f"has no config (*.py), .* such as {folder}"),
            (folder / "gone", "there is no work directory .*gone"),
        ):
            with pytest.raises(SystemExit):
                cli.parse(_parser(), [str(path)], model=True)
            error = capsys.readouterr().err
            assert re.search(message.replace("(*.py)", r"\(\*\.py\)"), error)


def _parser():
    parser = cli.Parser("text")
    cli.add_config(parser, or_work_dir=True)
    parser.add_argument("checkpoint")
    parser.add_argument("--flag", action="store_true")
    return parser


@pytest.mark.parametrize("trained", ["last_checkpoint", "20260101_000000/vis_data/scalars.json"])
def test_train_takes_a_work_directory_to_resume_only(tmp_path, trained, capsys):
    """Also before its first checkpoint."""
    (tmp_path / trained).parent.mkdir(parents=True, exist_ok=True)
    for name in ("nuclei.py", trained):
        (tmp_path / name).touch()
    assert main(["train", str(tmp_path)]) == 1
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main(["train", str(tmp_path), "--resume"]) == 1
    assert f"{tmp_path / 'nuclei.py'} is not a training config" in capsys.readouterr().err


def test_data_yaml_in_place_of_a_folder(tmp_path, monkeypatch, capsys):
    """Its ``path`` tells the folder, which has another set too; ``train`` takes the same."""
    root = sets.write_yolo(tmp_path / "birds", yaml_file=False)
    content = dict(path="../birds", val="images/val", names=["duck", "goose"])
    (tmp_path / "configs").mkdir()
    settings = tmp_path / "configs" / "some.yaml"
    for path, train in ((root / "all.yaml", "images"), (settings, "images/train")):
        path.write_text(yaml.safe_dump(dict(content, train=train)))
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(settings), "--weights", "none"]) == 0
    config = Path("birds.py").read_text()
    assert f"{root} (YOLO): 4 train, 2 val images" in config
    assert 'classes = ("duck", "goose")' in config
    for arguments, message in (
        (["train", str(settings)], "birds.py exists; train it"),
        (["init", str(settings), "--format", "coco"], "leave out --format coco"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    settings.write_text(yaml.safe_dump(dict(content, train="images", path="gone")))
    assert main(["init", str(settings)]) == 1
    assert f"{settings}: path: gone is no folder; correct it" in capsys.readouterr().err


def test_folder_in_place_of_a_config(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 1
    assert "is a folder, not a config; mmeformer init makes a config" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mmeformer"])
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mmeformer {command} ") and f"    mmeformer {command}" in text


def test_completion_knows_options_and_choices():
    options, choices = completion.words("init")
    assert {"--task", "--arch", "--out", "--help"} <= set(options)
    assert choices["--task"] == list(TASKS)
    assert completion.words("quickstart")[1][""] == list(TASKS)
    assert "--local_rank" not in completion.words("train")[0]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["ini"], {"init"}),
        (["init", "--ta"], {"--task"}),
        (["init", "--task", "seg"], {"segmentation"}),
        (["quickstart", "ro"], {"rotated"}),
    ],
)
def test_bash_completes(line, expected):
    words = " ".join(["mmeformer", *line])
    script = completion.bash() + (
        f"COMP_WORDS=({words}); COMP_CWORD={len(line)}; _mmeformer; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert set(done.stdout.split()) == expected


def test_fish_script_names_every_command():
    text = completion.fish()
    assert all(f"-f -a {name} -d '" in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("backend", "kept"),
    [("module://not_installed.inline", False), ("module://json.tool", True), ("agg", True)],
)
def test_backend_of_a_notebook_in_another_environment(backend, kept, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", backend)
    command.leave_backend_of_notebook()
    assert ("MPLBACKEND" in os.environ) == kept
