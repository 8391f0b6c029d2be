# SPDX-License-Identifier: Apache-2.0
"""Each error in DOTA label files is found and named; correct data passes."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeformer.checks.findings import ERROR, WARNING
from mmeformer.rotated.checks import check_dota
from mmeformer.rotated.dota import list_images, list_labels, read_labels

GOOD = "1 1 9 1 9 5 1 5 ship 0\n1 1 9 1 9 5 1 5 plane 1\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"images/{number}.png"), np.zeros((20, 20, 3), np.uint8))
        (tmp_path / f"labels/{number}.txt").write_text(GOOD)
    return tmp_path


def check(folder, **kwargs):
    images, labels = list_images(folder / "images"), list_labels(folder / "labels")
    return check_dota(images, labels, ("ship", "plane"), ("crane",), **kwargs)


def test_sound_data(folder):
    path = folder / "labels/0.txt"
    path.write_text("imagesource:x\ngsd:0.1\n" + GOOD + "1 1 9 1 9 5 1 5 crane 0\n")
    assert check(folder, decode=True) == []


@pytest.mark.parametrize(
    ("line", "severity", "kind", "message"),
    [
        ("1 1 9 1 9 5 ship 0", ERROR, "bad label line", "line 3: 8 fields"),
        ("1 1 9 1 9 5 1 x ship 0", ERROR, "bad label line", "must be numbers"),
        ("1 1 9 1 9 5 1 inf ship 0", ERROR, "bad label line", "finite"),
        ("1 1 9 1 9 5 1 5 ship maybe", ERROR, "bad label line", "difficult"),
        ("1 1 9 1 9 5 1 5 shp 0", ERROR, "unknown class", "line 3: 'shp' is not a class"),
        ("1 1 5 1 9 1 5 1 ship 0", ERROR, "empty box", "line 3: the corners enclose no area"),
        ("21 1 29 1 29 5 21 5 ship 0", ERROR, "outside image", "line 3: x from 21 to 29 and y"),
        ("1 -9 9 -9 9 0 1 0 ship 0", ERROR, "outside image", "outside the image of 20 x 20 px"),
        ("3 0.1 0.2 0.3 0.2 0.3 0.4 0.1 0.4", ERROR, "bad label line", "line 3: the class comes"),
        ("1 1 9 5 9 1 1 5 ship 0", WARNING, "crossed corners", "line 3: the outline crosses"),
    ],
)
def test_lines(folder, line, severity, kind, message):
    with (folder / "labels/1.txt").open("a") as file:
        file.write(line)
    (finding,) = check(folder)
    assert (finding.severity, finding.kind) == (severity, kind)
    assert finding.path == str(folder / "labels/1.txt") and message in finding.message


@pytest.mark.parametrize("number", [0, 0.25, 0.999])
def test_shares_of_the_image_are_no_pixels(folder, number):
    line = f"{number} 0.1 0.3 0.1 0.3 0.2 {number} 0.2 ship 0\n"
    (folder / "labels/1.txt").write_text(line)
    with pytest.raises(ValueError, match=r"1.txt has only numbers between 0 and 1: .* multiply"):
        read_labels(folder / "labels/1.txt")
    assert check(folder)[0].kind == "bad label line"
    # A box of one pixel, or another object, shows that these are pixels.
    for text in ("0 0 1 0 1 1 0 1 ship 0\n", line + "1 1 9 1 9 5 1 5 plane 0\n"):
        (folder / "labels/1.txt").write_text(text)
        assert read_labels(folder / "labels/1.txt")


def test_objects_that_reach_into_the_image_are_sound(folder):
    (folder / "labels/1.txt").write_text(GOOD + "-5 -5 1 -5 1 1 -5 1 ship 0\n")
    assert check(folder) == []


def test_files(folder):
    (folder / "labels/0.txt").rename(folder / "labels/other.txt")
    (folder / "labels/1.txt").write_text("1 1 9 1 9 5 1 5 ship 0\n")
    (folder / "images/1.png").write_bytes(b"")
    kinds = {finding.kind: finding.severity for finding in check(folder)}
    assert kinds == {
        "unreadable image": ERROR,
        "image without labels": WARNING,
        "labels without image": WARNING,
        "unused class": WARNING,
    }


WORDS = ["1", "9.5", "nan", "1e999", "ship", "-3", "\t", "\n", "\ufeff"]


@settings(max_examples=200)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_random_lines_never_pass_silently(tmp_path_factory, text):
    """Each line is read as an object, is blank or a header, or is named."""
    path = tmp_path_factory.getbasetemp() / "label.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        objects = read_labels(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert all(np.isfinite(item.polygon).all() and item.name for item in objects)
    stripped = path.read_text(encoding="utf-8-sig").splitlines()
    lines = [line.split() for line in stripped if line.split()]
    headers = [line for line in lines if line[0].lower().startswith(("imagesource:", "gsd:"))]
    assert len(objects) == len(lines) - len(headers)
