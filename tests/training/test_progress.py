# SPDX-License-Identifier: Apache-2.0
"""The progress bar in a terminal, and that nothing else changes."""

import io
import logging
import sys

import pytest
import tiny
from mmengine.config import Config
from rich.console import Console

from mmeformer import bars
from mmeformer.training import engine
from mmeformer.training.progress import ProgressHook, best_metric

pytestmark = pytest.mark.usefixtures("quiet_logging")


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    for name in ("JPY_PARENT_PID", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path):
    config = tiny.segmentation(tmp_path, iterations=4)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.save_best = "mIoU"
    config.work_dir = str(tmp_path / "run")
    return config


def build_in_terminal(config, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    runner = engine.build_train_runner(Config(config.to_dict()))
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, ProgressHook)]
    hook.SECONDS = 0
    return runner, hook, terminal


def streams(runner):
    return [
        handler.stream
        for handler in runner.logger.handlers
        if type(handler) is logging.StreamHandler
    ]


def test_a_bar_in_a_terminal(config, tmp_path, monkeypatch):
    runner, hook, terminal = build_in_terminal(config, monkeypatch)
    runner.train()
    text = terminal.getvalue()
    assert "4/4" in text and "eta 0:00:00" in text and "loss " in text and "best mIoU " in text
    assert "validate" in text
    # Lines of single iterations are in the log file alone; those of validations are in both.
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "Iter(train) [4/4]" in log.read_text() and "Iter(train) [4/4]" not in text
    assert "Iter(val) [1/1]    aAcc" in log.read_text() and "aAcc" in text
    # Everything is as it was before.
    assert sys.stdout is terminal and terminal in streams(runner) and hook.bar is None
    # So are those that fill a screen at the start.
    for start in ("System environment", "Config:", "Hooks will be", "paramwise_options"):
        assert start in log.read_text() and start not in text


def test_an_error_ends_the_bar(config, monkeypatch):
    runner, hook, terminal = build_in_terminal(config, monkeypatch)

    def interrupt():
        assert hook.bar is not None and sys.stdout is not terminal
        raise KeyboardInterrupt

    runner.register_hook(tiny.Recorder({2: interrupt}))
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert sys.stdout is terminal and hook.bar is None and terminal in streams(runner)
    # The cursor is shown again.
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")


def test_lines_elsewhere(config, monkeypatch):
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    runner = engine.build_train_runner(Config(config.to_dict()))
    assert not any(isinstance(hook, ProgressHook) for hook in runner.hooks)
    runner.train()
    assert "Iter(train) [4/4]" in output.getvalue() and "\x1b[?25" not in output.getvalue()
    assert "System environment" in output.getvalue()
    assert best_metric(runner)[0] == "mIoU"


def test_lines_in_a_notebook(config, tmp_path, monkeypatch):
    """After ``!`` it has a terminal, but does not follow the cursor; it needs no config either."""
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    assert not bars.output().is_terminal
    engine.build_train_runner(config).train()
    text = sys.stdout.getvalue()
    assert "Iter(train) [4/4]" in text and "\x1b[2K" not in text
    (log,) = (tmp_path / "run").glob("*/*.log")
    for start in ("System environment", "Config:", "Hooks will be", "paramwise_options"):
        assert start in log.read_text() and start not in text


def test_one_bar_of_all_processes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert ProgressHook.is_wanted()
    monkeypatch.setattr("mmeformer.training.progress.is_main_process", lambda: False)
    assert not ProgressHook.is_wanted()


def test_hooks_of_a_bar_that_was_never_started():
    hook = ProgressHook(Console(file=io.StringIO()))
    for call in (hook.before_val, hook.after_val, hook.after_train):
        call(None)
    hook.after_train_iter(None, 0)
    hook.after_val_iter(None, 0)
    assert hook.bar is None
