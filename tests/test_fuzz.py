# SPDX-License-Identifier: Apache-2.0
"""Readers of files from elsewhere: whatever the bytes, they give a value or an error for users.

The drawn cases take minutes (`make test-all`). What they have found stays as an example of its own.
Checkpoints are in checkpoints/test_damage.py, values of annotations in detection/test_checks.py.
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tiffs import write_tiff

from mmeformer.checkpoints import safe_load
from mmeformer.checks.images import UNREADABLE, decode_fault, read_header
from mmeformer.detection import annotations
from mmeformer.errors import CheckpointError
from mmeformer.images import Reading, decode_image
from mmeformer.rotated.dota import read_labels
from mmeformer.runtime.metadata import Metadata
from mmeformer.tasks import BACKBONE, TASKS

MANY = settings(
    max_examples=1500,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

DEEP = b"[" * 200_000
"""JSON that nests deeper than Python recurses."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


def pictures(folder):
    """The content of one small file of each format."""
    picture = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    contents = [
        cv2.imencode(suffix, picture)[1].tobytes() for suffix in (".png", ".jpg", ".bmp", ".webp")
    ]
    for bands in (3, 5):
        path = folder / f"{bands}.tif"
        deep = np.random.default_rng(0).integers(0, 4096, (9, 13, bands), np.uint16)
        write_tiff(path, deep)
        contents.append(path.read_bytes())
    return contents


@st.composite
def damaged(draw, contents):
    """A file with some bytes changed, cut off, inserted or repeated."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["byte", "word", "cut", "insert", "repeat"]))
        if kind == "byte":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "word":
            content[place : place + 4] = draw(
                st.sampled_from([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
            )
        elif kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=12))
        else:
            content[place:place] = content[: place + 1]
    return bytes(content)


def read_picture(path, data):
    """A picture or None; asserts that errors are for users."""
    path.write_bytes(data)
    try:
        read_header(str(path))
    except UNREADABLE:
        pass
    fault = decode_fault(str(path))
    assert fault is None or isinstance(fault, str)
    try:
        image = decode_image(data, path, Reading(bands=(1, 2, 3), stretch=(0, 4095)))
    except ValueError as error:
        assert str(path) in str(error)
        return None
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    return image


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_pictures(path, data):
    if not hasattr(test_pictures, "contents"):
        test_pictures.contents = pictures(path.parent)
    image = read_picture(path, data.draw(damaged(test_pictures.contents)))
    assert image is None or image.size > 0


@pytest.mark.parametrize("tag", [259, 284, 317, 322])
def test_pictures_found_earlier(path, tag):
    """An entry of a TIFF directory that is read late, of a type that does not exist."""
    content = bytearray(pictures(path.parent)[-1])
    place = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[place : place + 2], "little")
    entries = [place + 2 + 12 * index for index in range(count)]
    tags = [int.from_bytes(content[entry : entry + 2], "little") for entry in entries]
    # One that it has, or the last in place of one that it has not.
    entry = entries[tags.index(tag)] if tag in tags else entries[-1]
    content[entry : entry + 4] = tag.to_bytes(2, "little") + bytes(2)
    assert read_picture(path, bytes(content)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
METADATA = json.loads(
    Metadata("segmentation", "1", "config", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), True).to_json()
)


def read_metadata(text):
    """Metadata or None; asserts that errors are for users."""
    try:
        return Metadata.from_json(text, "model.onnx")
    except ValueError as error:
        assert "model.onnx" in str(error) and "\n" not in str(error)
        return None


@pytest.mark.slow
@MANY
@given(
    key=st.sampled_from(sorted(METADATA)) | st.text(max_size=5),
    value=JSON,
    cut=st.none() | st.integers(0, 400),
)
def test_metadata(key, value, cut):
    found = read_metadata(json.dumps({**METADATA, key: value})[:cut])
    # A changed key that is accepted does not change the task to an unknown one.
    assert found is None or found.task in (*TASKS, BACKBONE)


@pytest.mark.parametrize(
    "text",
    [
        DEEP.decode(),
        "",
        "null",
        "[]",
        '{"format": 1}',
        json.dumps({**METADATA, "task": {}}),
        json.dumps({**METADATA, "task": None}),
        json.dumps({**METADATA, "format": []}),
    ],
)
def test_metadata_found_earlier(text):
    assert read_metadata(text) is None


def test_metadata_that_is_right():
    found = read_metadata(json.dumps(METADATA))
    assert found is not None and {field.name for field in fields(found)} < {*METADATA}


def read_annotations(path, data):
    """Annotations or None; asserts that errors are for users."""
    path.write_bytes(data)
    try:
        return annotations.read(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


COCO = json.dumps(
    dict(
        images=[dict(id=0, file_name="0.jpg", width=40, height=30.0)],
        categories=[dict(id=1, name="cat")],
        annotations=[
            dict(id=0, image_id=0, category_id=1, bbox=[1, 2, 3, 4], iscrowd=0, area=None)
        ],
    )
).encode()


@pytest.mark.slow
@MANY
@given(data=damaged([COCO, COCO.decode().encode("utf-16"), b"\xef\xbb\xbf" + COCO]))
def test_annotation_files(path, data):
    found = read_annotations(path, data)
    # It is still JSON after the cleaning.
    assert json.dumps(found)


@pytest.mark.parametrize("data", [DEEP, b"", b"\xff", b'{"images": [' + DEEP, b'{"a": 1e999}\x00'])
def test_annotation_files_found_earlier(path, data):
    assert read_annotations(path, data) is None


@pytest.mark.slow
@MANY
@given(data=damaged([b"imagesource:GoogleEarth\ngsd:0.2\n1 1 9 1 9 5 1 5 ship 0\n"]))
def test_dota_files(path, data):
    path.write_bytes(data)
    try:
        found = read_labels(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(np.isfinite(item.polygon).all() for item in found)


WEIGHTS = save({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, {"meta": '{"version": 1}'})


def read_weights(path, data):
    """Weights or None; asserts that errors are for users."""
    path.write_bytes(data)
    try:
        return safe_load.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return None


@pytest.mark.slow
@MANY
@given(data=damaged([WEIGHTS]))
def test_safetensors(path, data):
    content = read_weights(path, data)
    assert content is None or all(isinstance(name, str) for name in content)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"PK\x03\x04",
        (2**63).to_bytes(8, "little") + b"{}",
        save({}, {"meta": "[" * 99_999}),
    ],
    ids=range(5),
)
def test_weights_found_earlier(path, data):
    content = read_weights(path, data)
    # The last has weights, none, and text of another program.
    assert content is None or content == {}


@pytest.mark.slow
def test_inputs_guided_by_coverage():
    """Two minutes by atheris, where it is installed (see tests/guided_fuzz.py)."""
    pytest.importorskip("atheris")
    script = Path(__file__).with_name("guided_fuzz.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("nothing found")
