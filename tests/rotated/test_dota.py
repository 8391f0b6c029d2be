# SPDX-License-Identifier: Apache-2.0
"""Label files are read to the last line or refused with the line's number."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmeformer.rotated.dota import (
    format_label,
    list_images,
    list_labels,
    read_label_files,
    read_labels,
)

ORIGINAL = """imagesource:GoogleEarth
gsd:0.255589285596
1054 1028 1063 1011 1111 1040 1112 1062 ship 1

807.5 331 800 -3.25 817 309 823 316 small-vehicle 0
"""


@pytest.mark.parametrize("prefix", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_original_files_with_header_lines(tmp_path, prefix, end):
    path = tmp_path / "P1.txt"
    path.write_bytes((prefix + ORIGINAL.replace("\n", end)).encode())
    first, second = read_labels(path)
    assert (first.name, first.difficult, first.line) == ("ship", 1, 3)
    assert (second.name, second.difficult, second.line) == ("small-vehicle", 0, 5)
    np.testing.assert_array_equal(
        second.polygon, [[807.5, 331], [800, -3.25], [817, 309], [823, 316]]
    )


def test_files_without_objects_and_lines_without_flag(tmp_path):
    path = tmp_path / "P1.txt"
    for text in ("", "\n\n", "imagesource:GoogleEarth\ngsd:null\n"):
        path.write_text(text)
        assert read_labels(path) == []
    path.write_text("0 0 1 0 1 1 0 1\tship\n")
    assert read_labels(path)[0].difficult == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3 4 ship 0", "6 fields instead of"),
        ("1 2 3 4 0.5 ship 0", "7 fields instead of 'x1 y1 x2 y2 x3 y3 x4 y4 class difficult'"),
        ("0 0 1 0 1 1 0 1 small vehicle 0", "11 fields instead of .* class names cannot"),
        ("0 0 1 0 1 1 0 x ship 0", "first 8 fields must be numbers"),
        ("0 0 1 0 1 1 0 nan ship 0", "must be finite"),
        ("0 0 1 0 1 1 0 1 ship easy", "difficult must be .* 'easy'"),
        ("0 0 1 0 1 1 0 1 ship 0.9", "difficult must be .* '0.9'"),
        ("0,0,1,0,1,1,0,1,ship,0", "1 fields instead of"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "P1.txt"
    path.write_text(f"gsd:1\n0 0 1 0 1 1 0 1 ship 0\n{line}\n")
    with pytest.raises(ValueError, match=rf"(?s)P1\.txt has invalid lines.*line 3: .*{message}"):
        read_labels(path)


def test_many_bad_lines_are_counted_and_binary_files_refused(tmp_path):
    path = tmp_path / "P1.txt"
    path.write_text("bad\n" * 12)
    with pytest.raises(ValueError, match="line 5.*\n.*and 7 more"):
        read_labels(path)
    path.write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(ValueError, match="P1.txt is not a text file"):
        read_labels(path)


@given(
    corners=st.lists(
        st.integers(-10_000_000, 10_000_000).map(lambda cents: cents / 100),
        min_size=8,
        max_size=8,
    ),
    difficult=st.integers(0, 2),
)
def test_written_labels_are_read_back(tmp_path_factory, corners, difficult):
    path = tmp_path_factory.mktemp("labels") / "a.txt"
    polygon = np.array(corners).reshape(4, 2)
    path.write_text(format_label(polygon, "ship", difficult))
    (found,) = read_labels(path)
    np.testing.assert_array_equal(found.polygon, polygon)
    assert found[1:] == ("ship", difficult, 1)


def test_text_in_utf_16_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0 0 1 0 1 1 0 1 ship 0", encoding="utf-16")
    with pytest.raises(ValueError, match="a.txt is not a text file in UTF-8"):
        read_labels(path)


def test_thousands_of_unknown_classes_make_a_short_message(tmp_path):
    """Such as labels whose class is the number of the object."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"0 0 1 0 1 1 0 1 object{i} 0\n" for i in range(5000)))
    with pytest.raises(ValueError, match=r"(?s)have 5000 classes .* and 4980 more") as raised:
        read_label_files([path], [f"class{i}" for i in range(5000)])
    assert len(str(raised.value)) < 3000


def test_unknown_classes_are_named_with_place_and_fix(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(
            "0 0 1 0 1 1 0 1 ship 0\n0 0 1 0 1 1 0 1 shp 0\n0 0 1 0 1 1 0 1 plane 0\n"
        )
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError) as error:
        read_label_files(paths, ["ship"])
    message = str(error.value)
    assert f"'shp': 2 objects, the first in {paths[0]} line 2" in message
    assert f"'plane': 2 objects, the first in {paths[0]} line 3" in message
    assert "dropped_classes=['plane', 'shp']" in message
    first, second = read_label_files(paths, ["ship"], ["plane", "shp"])
    assert [item.name for item in first + second] == ["ship", "ship"]


def test_bad_lines_of_several_files_are_reported_together(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("bad")
    with pytest.raises(ValueError, match=r"(?s)a\.txt has invalid.*b\.txt has invalid"):
        read_label_files(sorted(tmp_path.iterdir()), ["ship"])


def test_images_of_mixed_suffixes(tmp_path):
    for name in ("b.PNG", "a.v2.jpg", "c.tif", "d.bmp", "e.jpeg", "._b.png", "notes.doc"):
        (tmp_path / name).touch()
    found = list_images(tmp_path)
    assert list(found) == ["a.v2", "b", "c", "d", "e"]
    assert found["b"] == tmp_path / "b.PNG"
    assert list(list_images(tmp_path, "png")) == list(list_images(tmp_path, ".PNG")) == ["b"]
    (tmp_path / "b.jpg").touch()
    with pytest.raises(ValueError, match=r"b\.PNG and .*b\.jpg differ only in their suffix"):
        list_images(tmp_path)


def test_list_of_images_of_one_name(tmp_path):
    """A name after a tab is that of the label file."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").touch()
    file = tmp_path / "images.txt"
    file.write_text("b/1.png\tb_1\na/1.png\n")
    assert list_images(file) == {"1": tmp_path / "a/1.png", "b_1": tmp_path / "b/1.png"}
    file.write_text("b/1.png\na/1.png\n")
    with pytest.raises(ValueError, match="line 2: .*a/1.png has the same name.*after a tab"):
        list_images(file)


def test_missing_files_are_named(tmp_path):
    for function in (list_images, list_labels):
        with pytest.raises(FileNotFoundError, match="folder .*nowhere does not exist"):
            function(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no label file"):
        list_labels(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is empty"):
        list_images(tmp_path)
    (tmp_path / "a.gif").touch()
    with pytest.raises(FileNotFoundError, match=r"the files there end in \['.gif'\]"):
        list_images(tmp_path)


def test_100_000_objects_take_seconds(tmp_path):
    line = "1054.5 1028 1063 1011 1111 1040 1112 1062 ship 1\n"
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text(line * 1000)
    start = time.process_time()
    files = read_label_files(sorted(tmp_path.iterdir()), ["ship"])
    assert sum(map(len, files)) == 100_000
    assert time.process_time() - start < 10
