# SPDX-License-Identifier: Apache-2.0
"""Cutting: every pixel and object lands where it belongs, and runs can be interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from helpers import load_script
from hypothesis import given
from hypothesis import strategies as st

from mmeformer.files import is_draft
from mmeformer.paths import tools_dir
from mmeformer.rotated import DOTADataset
from mmeformer.rotated.dota import DotaObject, format_label, read_labels
from mmeformer.rotated.patches import (
    CutSettings,
    PatchName,
    Split,
    objects_inside,
    parse_patch_name,
    share_inside,
)
from mmeformer.windows import FILL

HEADER = "imagesource:GoogleEarth\ngsd:0.2\n"


def write_source(folder, sizes, objects=12, seed=0):
    """Images of the given (width, height) with random quadrilaterals; returns the folder."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "labelTxt").mkdir()
    for name, (width, height) in sizes.items():
        image = generator.integers(0, 256, (height, width, 3), np.uint8)
        cv2.imwrite(str(folder / "images" / name), image)
        lines = []
        for number in range(objects):
            center = generator.uniform(0, (width, height))
            rectangle = (center, generator.uniform(4, 30, 2), generator.uniform(0, 180))
            polygon = cv2.boxPoints(rectangle)
            lines.append(format_label(polygon, f"class{number % 3}", number % 2))
        stem = name.rsplit(".", 1)[0]
        (folder / "labelTxt" / f"{stem}.txt").write_text(HEADER + "\n".join(lines) + "\n")
    return folder


def split(source, target, settings, workers=1):
    """Cut one source; returns the outcomes."""
    return list(
        Split([(source / "images", source / "labelTxt")], target, settings).run(workers=workers)
    )


def contents(folder):
    """Bytes of all files, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@given(
    name=st.text(alphabet="aP_1. ", min_size=1),
    size=st.integers(1, 9999),
    x=st.integers(0, 99999),
    y=st.integers(0, 99999),
)
def test_names_of_patches_are_read_back(name, size, x, y):
    patch = PatchName(name, size, x, y)
    assert parse_patch_name(str(patch)) == patch


def test_names_with_underscores_and_names_of_no_patch():
    assert parse_patch_name("a__1__2___3__1024__0___512") == ("a__1__2___3", 1024, 0, 512)
    for name in ("P0001", "P0001__1024__0__512", "__1024__0___0", "P__1024__0___0.5"):
        with pytest.raises(ValueError, match="is not the name of a patch"):
            parse_patch_name(name)


@given(
    data=st.lists(st.floats(-40, 140), min_size=8, max_size=8),
    window=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(50, 90)),
)
def test_share_inside_is_that_of_the_outline(data, window):
    polygon = np.array(data).reshape(1, 4, 2)
    x, y, size = window
    window = (x, y, x + size, y + size)
    outline = shapely.MultiPoint(polygon[0]).convex_hull
    (share,) = share_inside(polygon, window)
    assert 0 <= share <= 1 + 1e-9
    if outline.area > 1e-6:
        expected = outline.intersection(shapely.box(*window)).area / outline.area
        assert share == pytest.approx(expected, abs=1e-6)


def test_share_of_objects_without_area_is_decided_by_the_center():
    line = np.array([[0, 5], [10, 5], [0, 5], [10, 5]], float)
    shares = share_inside(np.stack([line, line + [7, 0], line + [60, 0]]), (0, 0, 12, 12))
    np.testing.assert_array_equal(shares, [1, 1, 0])
    assert share_inside(line[None] + [9, 0], (0, 0, 12, 12)) == [0]


def test_cut_objects_keep_their_flag_or_become_difficult():
    def square(x, difficult):
        polygon = np.array([[x, 0], [x + 10, 0], [x + 10, 10], [x, 10]], float)
        return DotaObject(polygon, "ship", difficult, 1)

    objects = [square(20, 0), square(-3, 1), square(-4, 1), square(-9, 0), square(-10, 0)]
    window = (0, 0, 100, 100)
    dropped = objects_inside(objects, window, CutSettings(size=100, overlap=0))
    assert [item.difficult for item in dropped] == [0, 1]
    np.testing.assert_array_equal(dropped[1].polygon, objects[1].polygon)
    kept = objects_inside(objects, window, CutSettings(size=100, overlap=0, truncated="difficult"))
    assert [item.difficult for item in kept] == [0, 1, 2, 2]
    strict = objects_inside(objects, window, CutSettings(size=100, overlap=0, iof=1.0))
    assert len(strict) == 1
    moved = objects_inside(objects, (15, 0, 115, 100), CutSettings(size=100, overlap=0))
    np.testing.assert_array_equal(moved[0].polygon[0], [5, 0])


def test_patches_hold_the_pixels_and_objects_of_their_windows(tmp_path):
    source = write_source(tmp_path / "DOTA", {"a__b.png": (150, 130), "c.bmp": (40, 90)})
    outcomes = split(source, tmp_path / "cut", CutSettings(size=64, overlap=16))
    assert [outcome.error for outcome in outcomes] == [None, None]
    names = [name for outcome in outcomes for name in outcome.patches]
    assert len(names) == 9 + 2
    for name in names:
        patch = parse_patch_name(name)
        assert patch.size == 64
        (path,) = (source / "images").glob(f"{patch.image}.*")
        whole = cv2.imread(str(path))[patch.y : patch.y + 64, patch.x : patch.x + 64]
        found = cv2.imread(str(tmp_path / "cut" / "images" / f"{name}.png"))
        assert found.shape == (64, 64, 3)
        height, width = whole.shape[:2]
        np.testing.assert_array_equal(found[:height, :width], whole)
        assert (found[:, width:] == FILL).all()
        window = (patch.x, patch.y, patch.x + width, patch.y + height)
        expected = []
        for item in read_labels(source / "labelTxt" / f"{patch.image}.txt"):
            outline = shapely.Polygon(item.polygon)
            if outline.intersection(shapely.box(*window)).area >= 0.7 * outline.area:
                expected.append((item.polygon - window[:2], item.name, item.difficult))
        labels = read_labels(tmp_path / "cut" / "annfiles" / f"{name}.txt")
        assert len(labels) == len(expected)
        for item, (polygon, *rest) in zip(labels, expected, strict=True):
            np.testing.assert_allclose(item.polygon, polygon, atol=0.006)
            assert [item.name, item.difficult] == rest
    dataset = DOTADataset(
        data_root=str(tmp_path / "cut"),
        ann_file="annfiles/",
        data_prefix=dict(img_path="images/"),
        metainfo=dict(classes=("class0", "class1", "class2")),
    )
    assert len(dataset) == 11


def test_rates_cut_windows_of_other_sizes(tmp_path):
    source = write_source(tmp_path / "DOTA", {"a.png": (150, 100)})
    settings = CutSettings(size=64, overlap=16, rates=(0.5, 1.0), pad=False, suffix="bmp")
    (outcome,) = split(source, tmp_path / "cut", settings)
    sizes = [parse_patch_name(name).size for name in outcome.patches]
    assert sizes.count(128) == 2 and sizes.count(64) == 6
    large = cv2.imread(str(tmp_path / "cut" / "images" / "a__128__22___0.bmp"))
    np.testing.assert_array_equal(large, cv2.imread(str(source / "images" / "a.png"))[:, 22:])


def test_empty_patches_and_images_without_labels(tmp_path):
    source = write_source(tmp_path / "DOTA", {"a.png": (150, 100), "b.png": (64, 64)}, objects=1)
    (source / "labelTxt" / "b.txt").unlink()
    kept = split(source, tmp_path / "kept", CutSettings(size=64, overlap=16))
    assert len(kept[1].patches) == 1
    assert (tmp_path / "kept" / "annfiles" / "b__64__0___0.txt").read_text() == ""
    settings = CutSettings(size=64, overlap=16, keep_empty=False)
    dropped = split(source, tmp_path / "dropped", settings)
    assert dropped[1].patches == [] and len(dropped[0].patches) < len(kept[0].patches)
    for path in (tmp_path / "dropped" / "annfiles").iterdir():
        assert path.read_text() != ""
    # An image that gave no patch is finished all the same.
    sources = [(source / "images", source / "labelTxt")]
    assert Split(sources, tmp_path / "dropped", settings).pending == []


def test_several_folders_and_test_sets(tmp_path):
    first = write_source(tmp_path / "train", {"a.png": (70, 70)})
    second = write_source(tmp_path / "val", {"b.png": (70, 70)}, seed=1)
    pairs = [(folder / "images", folder / "labelTxt") for folder in (first, second)]
    settings = CutSettings(size=64, overlap=16)
    assert len(list(Split(pairs, tmp_path / "trainval", settings).run())) == 2
    list(Split([(first / "images", None)], tmp_path / "test", settings).run())
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == ["images", "split.jsonl"]
    with pytest.raises(ValueError, match="some have none"):
        Split([pairs[0], (second / "images", None)], tmp_path / "x", settings)
    with pytest.raises(ValueError, match="have the same name"):
        Split([pairs[0], pairs[0]], tmp_path / "x", settings)
    with pytest.raises(ValueError, match="no label file in .* belongs to an image"):
        Split([(first / "images", second / "labelTxt")], tmp_path / "x", settings)
    assert not (tmp_path / "x").exists()


def test_second_run_cuts_only_what_changed(tmp_path):
    source = write_source(tmp_path / "DOTA", {f"{n}.png": (100, 70) for n in "abcd"})
    target, settings = tmp_path / "cut", CutSettings(size=64, overlap=16)
    split(source, target, settings)
    before = contents(target)
    assert split(source, target, settings) == []
    assert contents(target) == before
    # Labels of one changed, a patch of another lost, a third image smaller, the fourth gone.
    (source / "labelTxt" / "a.txt").write_text(HEADER)
    (target / "images" / "b__64__36___6.png").unlink()
    cv2.imwrite(str(source / "images" / "c.png"), np.zeros((64, 64, 3), np.uint8))
    (source / "images" / "d.png").unlink()
    outcomes = split(source, target, settings)
    assert sorted(outcome.job.name for outcome in outcomes) == ["a", "b", "c"]
    after = contents(target)
    assert after["annfiles/a__64__0___0.txt"] == b""
    assert after["images/b__64__36___6.png"] == before["images/b__64__36___6.png"]
    assert [name for name in after if name.startswith("images/c")] == ["images/c__64__0___0.png"]
    assert not any("/d__" in name for name in after)


def test_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    source = write_source(tmp_path / "DOTA", {f"{n}.png": (200, 150) for n in "abcdef"})
    settings = CutSettings(size=64, overlap=16)
    split(source, tmp_path / "whole", settings)
    target = tmp_path / "cut"
    run = Split([(source / "images", source / "labelTxt")], target, settings).run()
    next(run), next(run)
    run.close()
    # What a kill leaves: half a line of the manifest, a half-written file, patches not listed.
    with open(target / "split.jsonl", "a") as manifest:
        manifest.write('{"image": "c", "finger')
    (target / "images" / ".c__64__0___0.draft-0123abcd.png").write_bytes(b"half")
    (target / "images" / "c__64__0___0.png").write_bytes(b"old")
    again = Split([(source / "images", source / "labelTxt")], target, settings)
    assert again.finished == 2 and [job.name for job in again.pending] == list("cdef")
    list(again.run())
    assert contents(target) == contents(tmp_path / "whole")
    assert not [path for path in target.rglob("*") if is_draft(path)]


def test_a_kill_before_the_manifest_is_there(tmp_path):
    source = write_source(tmp_path / "DOTA", {"a.png": (100, 70)})
    target, settings = tmp_path / "cut", CutSettings(size=64, overlap=16)
    for folder in ("images", "annfiles"):
        (target / folder).mkdir(parents=True)
    (target / ".split.draft-0123abcd.jsonl").write_text('{"sett')
    (outcome,) = split(source, target, settings)
    assert not [path for path in target.rglob("*") if is_draft(path)]
    assert len(outcome.patches) == len(list((target / "images").iterdir()))
    # A folder of the same name with something in it is not ours.
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "other" / "images" / "mine.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not made by this tool"):
        split(source, tmp_path / "other", settings)


@pytest.mark.parametrize(
    "damage", [b"", b'{"sett', b"[]\n[]\n", b"\xff\n", b'{"a": 1}\n{"image": 1}\n']
)
def test_damaged_manifest_is_named(tmp_path, damage):
    source = write_source(tmp_path / "DOTA", {"a.png": (100, 70)})
    settings = CutSettings(size=64, overlap=16)
    split(source, tmp_path / "cut", settings)
    (tmp_path / "cut" / "split.jsonl").write_bytes(damage)
    with pytest.raises(ValueError, match="cut/split.jsonl is damaged .*delete"):
        split(source, tmp_path / "cut", settings)


def test_processes_give_the_same_as_one(tmp_path):
    source = write_source(tmp_path / "DOTA", {f"{n}.png": (100, 70) for n in "abc"})
    settings = CutSettings(size=64, overlap=16)
    split(source, tmp_path / "one", settings)
    split(source, tmp_path / "two", settings, workers=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert sorted(one.pop("split.jsonl").split()) == sorted(two.pop("split.jsonl").split())
    assert one == two


def test_other_folders_and_other_settings_are_left_alone(tmp_path):
    source = write_source(tmp_path / "DOTA", {"a.png": (100, 70)})
    pairs = [(source / "images", source / "labelTxt")]
    with pytest.raises(FileExistsError, match="DOTA exists and was not made by"):
        Split(pairs, source, CutSettings())
    split(source, tmp_path / "cut", CutSettings(size=64, overlap=16))
    before = contents(tmp_path / "cut")
    with pytest.raises(FileExistsError, match='cut with other arguments.*"size": 64.*"size": 32'):
        Split(pairs, tmp_path / "cut", CutSettings(size=32, overlap=16))
    other = write_source(tmp_path / "other", {"a.png": (100, 70)}, seed=1)
    with pytest.raises(FileExistsError, match="cut with other arguments"):
        split(other, tmp_path / "cut", CutSettings(size=64, overlap=16))
    assert contents(tmp_path / "cut") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=64, overlap=64), "overlap 64"),
        (dict(rates=()), "rates"),
        (dict(rates=(0.0,)), "rates"),
        (dict(rates=(1.0, 1.0)), "same size"),
        (dict(iof=0.0), "iof 0.0"),
        (dict(truncated="keep"), "truncated is 'keep'"),
        (dict(suffix="gif"), "suffix 'gif'"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CutSettings(**arguments)


def load_tool():
    return load_script(tools_dir() / "split_dota.py")


def test_objects_and_labels_that_reach_no_patch_are_counted(tmp_path, capsys):
    source = write_source(tmp_path / "DOTA", {"a.png": (100, 70), "b.png": (100, 70)}, objects=0)
    lines = (
        "2 2 20 2 20 12 2 12 ship 0\n"  # inside
        "1 1 99 1 99 40 1 40 ship 0\n"  # longer than a patch
        "200 2 220 2 220 12 200 12 ship 0\n"  # outside
    )
    (source / "labelTxt" / "a.txt").write_text(lines)
    (source / "labelTxt" / "b.txt").write_text(lines)
    (source / "labelTxt" / "other.txt").write_text(lines)
    arguments = [str(source), str(tmp_path / "cut"), "--size", "64", "--overlap", "16"]
    command = load_tool()
    for again in range(2):
        # A second run, which cuts one image again, counts those of the first too.
        assert command.main(arguments) == 0
        output = " ".join(capsys.readouterr().out.split())
        assert "warning: 4 objects belong to no patch: they lie outside" in output
        assert "warning: 1 label files have no image, such as" in output
        if not again:
            (source / "labelTxt" / "a.txt").write_text(lines + "\n")
    options = ["--truncated", "difficult"]
    assert command.main([str(source), str(tmp_path / "other"), *arguments[2:], *options]) == 0
    assert "warning: 2 objects belong to no patch" in " ".join(capsys.readouterr().out.split())


def test_command_names_unreadable_images_and_goes_on(tmp_path, capsys):
    source = write_source(tmp_path / "DOTA", {f"{n}.png": (100, 70) for n in "abcd"})
    whole = (source / "images" / "b.png").read_bytes()
    (source / "images" / "b.png").write_bytes(whole[:-200])
    (source / "labelTxt" / "c.txt").write_text(HEADER + "1 2 3\n")
    arguments = [str(source), str(tmp_path / "cut"), "--size", "64", "--overlap", "16"]
    arguments += ["--workers", "2"]
    command = load_tool()
    assert command.main(arguments) == 1
    output = capsys.readouterr()
    joined = output.out.replace("\n", "")
    assert "b.png cannot be read as an image" in joined
    assert "line 1: 3 fields" in joined or "line 3: 3 fields" in joined
    assert "2 images were not cut: b, c" in output.err or "not cut: c, b" in output.err
    assert "8 patches of 2 images" in joined
    records = (tmp_path / "cut" / "split.jsonl").read_text().splitlines()[1:]
    assert sorted(json.loads(line)["image"] for line in records) == ["a", "d"]
    (source / "images" / "b.png").write_bytes(whole)
    (source / "labelTxt" / "c.txt").write_text(HEADER)
    assert command.main(arguments) == 0
    assert "2 images were cut before, 2 remain" in capsys.readouterr().out
    assert len(list((tmp_path / "cut" / "images").iterdir())) == 16


def test_command_says_what_is_wrong_with_its_arguments(tmp_path, capsys):
    source = write_source(tmp_path / "DOTA", {"a.png": (100, 70)})
    command = load_tool()
    assert command.main([str(source), str(tmp_path / "cut"), "--labels", "labels"]) == 1
    assert "does not exist (see --images, --labels, --no-labels)" in capsys.readouterr().err
    assert command.main([str(source), str(source)]) == 1
    assert "was not made by this tool" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([str(source), str(tmp_path / "cut"), "--workers", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_command_leaves_whole_patches(tmp_path, signal_number):
    source = write_source(tmp_path / "DOTA", {f"{n}.png": (600, 600) for n in range(60)})
    command = [sys.executable, str(tools_dir() / "split_dota.py"), str(source)]
    command += [str(tmp_path / "cut"), "--size", "128", "--overlap", "64", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        manifest = Path(tmp_path / "cut" / "split.jsonl")
        while not manifest.is_file() or len(manifest.read_text().splitlines()) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal_number)
        assert "run the same command again to continue" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    done = len(manifest.read_text().splitlines()) - 1
    assert 2 <= done < 60
    for path in (tmp_path / "cut" / "images").iterdir():
        assert cv2.imread(str(path)).shape == (128, 128, 3)
    subprocess.run(command, check=True)
    assert len(list((tmp_path / "cut" / "images").iterdir())) == 60 * 9 * 9
