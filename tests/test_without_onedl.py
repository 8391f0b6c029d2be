# SPDX-License-Identifier: Apache-2.0
"""The note about OneDL is dropped, and nothing else is."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine import logging as mmengine_logging

from mmeformer.without_onedl import NOTE, drop_note


@pytest.fixture
def print_log(monkeypatch):
    original = mmengine_logging.print_log
    monkeypatch.setattr(mmengine_logging, "print_log", getattr(original, "__wrapped__", original))
    drop_note()
    once = mmengine_logging.print_log
    drop_note()
    assert mmengine_logging.print_log is once
    return once


@pytest.mark.parametrize("library", ["mmdet", "mmseg", "mmrotate"])
def test_note_of_the_libraries(library, print_log, capsys):
    source = (Path(find_spec(library).origin).parent / "datasets/__init__.py").read_text()
    if "OneDL" not in source:
        pytest.skip(f"this {library} knows no OneDL")
    shown = source.partition("print_log(")[2].split("'")[1]
    assert shown.startswith(NOTE) and "level=logging.DEBUG" in source
    mmengine_logging.print_log(shown, level=logging.DEBUG)
    assert capsys.readouterr() == ("", "")


def test_other_messages_pass(print_log, capsys):
    print_log("Could not import torch", level=logging.DEBUG)
    print_log(f"{NOTE}, but you asked for it", level=logging.WARNING)
    print_log("plain")
    assert capsys.readouterr().out.splitlines() == [
        "Could not import torch",
        f"{NOTE}, but you asked for it",
        "plain",
    ]
