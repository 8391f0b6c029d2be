# SPDX-License-Identifier: Apache-2.0
"""Images are read whole or refused."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from mmeformer.images import read_image, write_image


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_damaged_images_are_named(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    path = tmp_path / f"image.{suffix}"
    write_image(path, image)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = read_image(path)
    np.testing.assert_array_equal(found, cv2.imread(str(path)))
    if suffix != "jpg":
        np.testing.assert_array_equal(found, image)
    data = path.read_bytes()
    for broken in (data[: len(data) * 3 // 4], b"", b"no image"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"image\.{suffix} cannot be read as an image"):
            read_image(path)


def test_grey_and_deep_images_become_three_channels(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 5), 7, np.uint8))
    cv2.imwrite(str(tmp_path / "b.tif"), np.full((4, 5), 7 << 8, np.uint16))
    for name in ("a.png", "b.tif"):
        assert (read_image(tmp_path / name) == 7).all()
        assert read_image(tmp_path / name).shape == (4, 5, 3)


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no image format has this suffix"):
        write_image(tmp_path / "a.docx", np.zeros((2, 2, 3), np.uint8))


def test_images_beyond_the_limits_of_opencv_are_named(tmp_path):
    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"0" * 100))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="a.png cannot be read by OpenCV, whose limits"):
        read_image(tmp_path / "a.png")
