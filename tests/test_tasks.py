# SPDX-License-Identifier: Apache-2.0
"""Adding a task takes one row: every command, its help and its errors follow."""

import ast
import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest

import mmeformer
from mmeformer import tasks
from mmeformer.runtime import Metadata
from mmeformer.starter import Starter

COMMANDS = sorted(
    path.stem
    for path in (Path(mmeformer.__file__).parent / "commands").glob("*.py")
    if path.stem not in ("__init__", "__main__", "cli")
)
DEPTH = tasks.Task(
    name="depth",
    scope="mmdepth",
    libraries=("mmdepth",),
    predictor="mmdepth.predictor:DepthPredictor",
    outputs="depths/NAME.png",
    export=tasks.Export("mmdepth.graph:DepthGraph", None, "mmdepth.decoder:decode", True),
    quickstart="mmdepth.quickstart:QUICKSTART",
    datasets=("mmdepth.DepthDataset",),
    starter="mmdepth.starter:STARTER",
    labels=("depths",),
    review="mmdepth.review:DepthReview",
)


def main(command: str):
    return importlib.import_module(f"mmeformer.commands.{command}").main


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(command)(["--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def depth(monkeypatch):
    """A task more than there are."""
    monkeypatch.setitem(tasks.TASKS, "depth", DEPTH)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with a config of an unknown task, and files to give to commands."""
    monkeypatch.chdir(tmp_path)
    loader = dict(dataset=dict(type="mmdet.CocoDataset", ann_file="a.json", pipeline=[]))
    settings = dict(default_scope="mmunknown", model=dict(), train_dataloader=loader)
    Path("config.py").write_text("\n".join(f"{key} = {value!r}" for key, value in settings.items()))
    Path("checkpoint.pth").touch()
    Path("model.onnx").touch()
    cv2.imwrite("picture.png", np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_rows_name_what_exists(name):
    task = tasks.TASKS[name]
    for library in task.libraries:
        pytest.importorskip(library)
    export = task.export
    for reference in (
        *(task.predictor, export.graph, export.coreml_graph, export.decoder, task.review),
    ):
        assert reference is None or callable(tasks.load(reference))
    assert Path(tasks.load(task.quickstart).config).parts[0] == name
    assert isinstance(tasks.load(task.starter), Starter)
    assert tasks.of_config(dict(default_scope=task.scope)) is task


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_all_tasks_or_none(depth, command, capsys):
    text = help_of(command, capsys)
    # As words of their own: "detections" and configs/detection/ say nothing of other tasks.
    words = {word.strip("{},.:;()") for word in text.replace(",", " ").split()}
    assert words >= set(tasks.TASKS) or not words & set(tasks.TASKS)
    assert "three tasks" not in text


def test_help_follows_the_row(depth, capsys):
    assert "depth" in help_of("quickstart", capsys)
    assert "depth depths/NAME.png" in help_of("predict", capsys)


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("predict", "config.py checkpoint.pth picture.png"),
        ("export", "config.py checkpoint.pth --to onnx --dynamic --out new.onnx"),
        ("export", "config.py checkpoint.pth --to coreml --size 64 64 --out new.mlpackage"),
        ("test", "config.py model.onnx"),
        ("profile", "config.py"),
        ("check_dataset", "config.py --split train"),
    ],
)
def test_an_unknown_scope(depth, inputs, command, arguments, capsys):
    assert main(command)(arguments.split()) == 1
    error = capsys.readouterr().err
    assert "config.py has default_scope 'mmunknown'; set it to one of mmdet (detection)" in error
    assert "mmdepth (depth)" in error and error.count("\n") == 1


def test_an_unknown_quickstart(depth, capsys):
    with pytest.raises(SystemExit):
        main("quickstart")(["flow"])
    error = capsys.readouterr().err
    assert all(name in error for name in tasks.TASKS)


def test_metadata_of_exported_files(depth):
    values = dict(version="0", config="config", mean=(0.0,) * 3, std=(1.0,) * 3, bgr_to_rgb=True)
    assert Metadata(task="depth", **values).export.stretches
    with pytest.raises(ValueError, match=r"one of backbone, .*, depth, but is 'flow'"):
        Metadata(task="flow", **values)


def test_coreml_where_it_lacks_operators(depth):
    from mmeformer.deploy.graphs import graph_class

    with pytest.raises(ValueError, match="export models for depth to ONNX"):
        graph_class("depth", "coreml")


def test_shared_files_name_no_task():
    """No ``if task == ...``, no table of tasks, beside the rows."""
    package = Path(mmeformer.__file__).parent
    rooms = {"checks", "commands", "deploy", "inference", "report", "runtime", "training"}
    files = {"quickstart.py", "results.py", "own_data.py", "starter.py", "labeled.py"}
    named = [
        f"{path.relative_to(package)}, line {node.lineno}: {node.value}"
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] in rooms | files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in tasks.TASKS
    ]
    assert named == []
