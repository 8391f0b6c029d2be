# SPDX-License-Identifier: Apache-2.0
"""The report of a training: of every task, after Ctrl-C, and when something is missing."""

import logging
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import tiny
import torch
from mmengine.config import Config

from mmeformer.commands import report as command
from mmeformer.commands import train
from mmeformer.report import build

pytestmark = pytest.mark.usefixtures("quiet_logging")

SECTIONS = ("Curves", "Classes", "Images", "Labels", "Speed", "Next steps", "Config and versions")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """What a page has, and that its tags are closed in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.titles, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)


def read(path):
    text = path.read_text()
    page = Page(text)
    # Everything is inside the file.
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "<script" not in text and "http" not in re.sub(r"data:[^\"']+", "", page.text[:200])
    return page


@pytest.fixture
def warnings(monkeypatch):
    """Lines that the report logs as warnings."""
    lines = []

    def record(text, logger=None, level=logging.INFO):
        if level >= logging.WARNING:
            lines.append(text)

    monkeypatch.setattr(build, "print_log", record)
    return lines


@pytest.fixture(scope="session")
def written(work_dir):
    """The report of every task in turn."""
    return build.write(work_dir, device="cpu")


def test_every_section_of_every_task(written):
    page = read(written)
    assert tuple(page.titles) == SECTIONS
    assert "Not available" not in page.text and "No predictions" not in page.text
    # Three curves, the confusion matrix, images with labels and predictions, the labels.
    kinds = [source.partition(";")[0] for source in page.sources]
    assert kinds.count("data:image/svg+xml") >= 5
    assert 1 <= kinds.count("data:image/jpeg") <= 2
    assert "best score, iteration 40" in page.text and "0.4" in page.text
    assert "trained.pth on all validation images" in page.text
    assert "200 ms" in page.text and "8 training images" in page.text
    assert "mmeformer export" in page.text and "torch" in page.text


def test_the_command(work_dir, warnings, capsys):
    """Without predictions the rest is there."""
    assert command.main([str(work_dir), "--images", "0"]) == 0
    assert capsys.readouterr().out.strip() == str(work_dir / "report.html")
    page = read(work_dir / "report.html")
    assert tuple(page.titles) == SECTIONS
    assert "No predictions: no images were to be predicted" in page.text
    assert "8 training images" in page.text
    assert len(warnings) == 1


def test_a_folder_that_is_no_work_directory(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no config" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_in_a_browser(written, tmp_path):
    """Chromium shows the page without a complaint, at a desk and on a phone."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    for width in (1200, 400):
        picture = tmp_path / f"{width}.png"
        run = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--enable-logging=stderr", "--virtual-time-budget=5000"),
                *(f"--window-size={width},1600", f"--screenshot={picture}"),
                f"--user-data-dir={tmp_path / 'profile'}",
                written.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert picture.is_file(), run.stderr
        assert "CONSOLE" not in run.stderr, run.stderr


# --- at the end of a training --------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """A training of four iterations with a validation in between."""
    config = tiny.segmentation(tmp_path, iterations=4)
    config.train_cfg.val_interval = 2
    config.default_hooks.checkpoint.save_best = "mIoU"
    config.work_dir = str(tmp_path / "run")
    return config


def run(config, path, *options):
    config.dump(path)
    threads = torch.get_num_threads()
    try:
        return train.main([str(path), *options])
    finally:
        torch.set_num_threads(threads)


def test_after_a_training(config, tmp_path):
    assert run(config, tmp_path / "config.py") == 0
    page = read(tmp_path / "run" / "report.html")
    assert "best_mIoU_iter_" in page.text and "Not available" not in page.text
    assert "Evaluate on the test data" in page.text and "--resume" not in page.text


def test_after_ctrl_c(config, tmp_path, monkeypatch):
    """With what there is by then; how to go on is told."""

    def interrupt(self, runner, *args, **kwargs):
        if runner.iter == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("mmeformer.training.runner.StepSeedHook.before_train_iter", interrupt)
    assert run(config, tmp_path / "config.py") == 130
    page = read(tmp_path / "run" / "report.html")
    assert "Continue the training" in page.text and "--resume" in page.text
    assert "best_mIoU_iter_2.pth" in page.text


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError, KeyboardInterrupt])
def test_a_failing_report_fails_no_training(error, config, tmp_path, monkeypatch, warnings):
    def fail(*args, **kwargs):
        raise error("out of paper")

    monkeypatch.setattr(build, "write_text", fail)
    monkeypatch.setattr(build._Report, "html", lambda self: "")
    (tmp_path / "run").mkdir()
    config.dump(tmp_path / "run" / "config.py")
    runner = FakeRunner(config, iterations=3)
    with build.after_training(runner):
        runner.trained = True
    assert runner.trained and len(warnings) == 1 and "\n" not in warnings[0]
    assert "out of paper" in warnings[0] or error is KeyboardInterrupt


class FakeRunner:
    def __init__(self, config, iterations=0):
        self.cfg, self.work_dir, self.trained = config, config.work_dir, False
        self.iter = iterations


def test_no_report_where_nothing_was_trained_or_wanted(config, tmp_path, warnings, monkeypatch):
    runner = FakeRunner(config)
    with pytest.raises(KeyboardInterrupt), build.after_training(runner):
        raise KeyboardInterrupt
    monkeypatch.setattr(build, "write", lambda *args, **kwargs: pytest.fail("was written"))
    runner = FakeRunner(config, iterations=3)
    runner.cfg = Config(dict(report=None))
    with build.after_training(runner):
        pass
    # Nor of the other processes of a run.
    monkeypatch.setattr(build, "is_main_process", lambda: False)
    runner.cfg = config
    with build.after_training(runner):
        pass
    # Errors of the program itself leave no report: what they left behind may be anything.
    monkeypatch.setattr(build, "is_main_process", lambda: True)
    with pytest.raises(ZeroDivisionError), build.after_training(runner):
        raise ZeroDivisionError
    assert warnings == [] and not (tmp_path / "run").exists()
