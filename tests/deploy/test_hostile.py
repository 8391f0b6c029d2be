# SPDX-License-Identifier: Apache-2.0
"""What a stranger's file may do to the runtime: nothing but an error."""

import builtins
import io
import os

import pytest

from mmeformer import runtime


def test_the_runtime_writes_no_files(onnx_file, picture, monkeypatch):
    """Not even where a name in the metadata or of an image says so."""
    path = onnx_file("segmentation")

    def guard(name, original, writes):
        def guarded(*args, **kwargs):
            assert not writes(*args, **kwargs), f"{name}{args}"
            return original(*args, **kwargs)

        return guarded

    def opens_to_write(file, mode="r", *args, **kwargs):
        return set(mode) & set("wax+") != set()

    def flags_to_write(path, flags, *args, **kwargs):
        return flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0

    for owner in (builtins, io):
        monkeypatch.setattr(owner, "open", guard("open", owner.open, opens_to_write))
    monkeypatch.setattr(os, "open", guard("os.open", os.open, flags_to_write))
    for name in ("mkdir", "rename", "replace", "remove", "unlink", "symlink"):
        monkeypatch.setattr(os, name, guard(name, getattr(os, name), lambda *args, **kwargs: True))
    with pytest.raises(AssertionError):
        open(path, "ab")
    model = runtime.load(path)
    assert model.predict(picture) is not None
