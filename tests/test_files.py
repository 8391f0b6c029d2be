# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there: failures, kills, existing files, folders, rights."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmeformer import files
from mmeformer.files import is_draft, replacing, write_bytes, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_new_and_existing_files(sync, tmp_path):
    path = tmp_path / "deep" / "er" / "note.txt"
    write_text(path, "first, µ", sync)
    assert path.read_bytes() == "first, µ".encode()
    write_bytes(path, b"second", sync)
    assert path.read_bytes() == b"second"
    assert names(path.parent) == ["note.txt"]


def test_the_draft_is_beside_the_file_hidden_and_of_the_same_kind(tmp_path):
    path = tmp_path / "model.tar.onnx"
    with replacing(path) as draft:
        assert draft.parent == tmp_path and draft.suffix == ".onnx"
        assert draft.name.startswith(".model.tar.") and is_draft(draft) and not draft.exists()
        with replacing(path) as other:
            assert other != draft
            other.write_text("other")
        draft.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["model.tar.onnx"]
    assert not is_draft(path) and not is_draft(".gitignore") and not is_draft("a.draft-0.png")
    with replacing(tmp_path / "no_suffix") as draft:
        assert is_draft(draft)
        draft.write_text("")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_was_there(error, existing, tmp_path):
    path = tmp_path / "a.json"
    if existing:
        path.write_text("precious")
    with pytest.raises(error), replacing(path, sync=True) as draft:
        draft.write_text("half")
        raise error
    assert names(tmp_path) == (["a.json"] if existing else [])
    assert not existing or path.read_text() == "precious"


KILLED = """
import os, signal, sys
from mmeformer.files import replacing
with replacing(sys.argv[1]) as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("precious")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "precious"
    (left,) = (entry for entry in tmp_path.iterdir() if entry != path)
    assert is_draft(left) and left.read_text() == "half"
    write_text(path, "new")
    assert path.read_text() == "new" and left.exists()


def test_rights_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "")
        with replacing(tmp_path / "folder") as draft:
            draft.mkdir()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("sync", [False, True])
def test_folders_are_swapped_whole(sync, tmp_path):
    path = tmp_path / "model.mlpackage"
    for turn in ("first", "second"):
        with replacing(path, sync) as draft:
            (draft / "Data").mkdir(parents=True)
            (draft / "Data" / f"{turn}.bin").write_text(turn)
        assert names(path / "Data") == [f"{turn}.bin"]
    with pytest.raises(ValueError), replacing(path, sync) as draft:
        draft.mkdir()
        raise ValueError
    assert names(tmp_path) == ["model.mlpackage"] and names(path / "Data") == ["second.bin"]


def test_a_folder_that_cannot_be_swapped_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "precious").write_text("precious")
    rename = os.rename

    def fail(source, target):
        if str(target) == str(path) and (source / "new").exists():
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*/folder'"), replacing(path) as draft:
        draft.mkdir()
        (draft / "new").write_text("")
    assert names(tmp_path) == ["folder"] and names(path) == ["precious"]


def test_errors_name_the_file_and_not_its_draft(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("")
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "folder", "text")
    assert error.value.filename == str(tmp_path / "folder") and ".draft-" not in str(error.value)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError) as error, replacing(tmp_path / "file") as draft:
        draft.mkdir()
    assert error.value.filename == str(tmp_path / "file")
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "forgotten"):
        pass
    assert error.value.filename == str(tmp_path / "forgotten")
    # Errors about other files are left alone.
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert error.value.filename == str(tmp_path / "b")
    assert names(tmp_path) == ["file", "folder"]


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "there" / "file.txt")
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "file.txt").read_text() == text
    assert names(tmp_path / "there") == ["file.txt"]


def test_pipes_are_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "through", sync=False)
    reader.join(timeout=60)
    assert read == ["through"] and pipe.is_fifo() and names(tmp_path) == ["pipe"]


def test_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """The order of calls; that they work is the system's promise."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", spy_fsync)
    monkeypatch.setattr(files.os, "replace", spy_replace)
    write_text(tmp_path / "a", "text", sync=True)
    assert calls == ["file", "rename", "folder"]
    calls.clear()
    write_text(tmp_path / "a", "text")
    assert calls == ["rename"]


def test_long_names_and_names_in_other_scripts(tmp_path):
    for name in ("x" * 250 + ".png", "航" * 80 + ".png"):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name


@pytest.mark.parametrize("url", ["https://host/a/b.json", "s3://bucket/b.json"])
def test_urls_are_no_paths(url, tmp_path, monkeypatch):
    """pathlib makes ``https:/`` of ``https://``, which messages repeated and outputs created."""
    from mmeformer import configs, runtime
    from mmeformer.inference.inputs import find_sources
    from mmeformer.inference.outputs import prepare_folder

    monkeypatch.chdir(tmp_path)
    for use in (
        configs.load_config,
        runtime.load,
        prepare_folder,
        lambda path: find_sources([path]),
        lambda path: write_text(path, "content"),
        lambda path: write_text(Path(path), "content"),
    ):
        with pytest.raises(ValueError, match=f" {url} is a URL; give a local path"):
            use(url)
    assert not list(tmp_path.iterdir())
