# SPDX-License-Identifier: Apache-2.0
"""How far a command is."""

from mmeformer import bars
from mmeformer.checks.images import in_threads


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(bars, "COUNT_EVERY", 0)
    assert in_threads(abs, [-3, 2, -1], "images read") == [3, 2, 1]
    assert capsys.readouterr().err.splitlines() == [
        "images read: 0 of 3",
        "images read: 1 of 3",
        "images read: 2 of 3",
    ]


def test_short_work_says_nothing(capsys):
    assert list(bars.counted("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_reading_a_large_file_is_said(monkeypatch, capsys, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text("[1, 2]")
    assert bars.read_json(path) == [1, 2] and capsys.readouterr().err == ""
    monkeypatch.setattr(bars, "LARGE", 6)
    assert bars.read_json(path) == [1, 2]
    assert capsys.readouterr().err == f"reading {path} (0 MB)\n"
