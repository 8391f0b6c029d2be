# SPDX-License-Identifier: Apache-2.0
"""Images are read whole or refused."""

import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiffs import RGB, write_tiff

from mmeformer import images
from mmeformer.images import Reading, read_image, read_layout, write_image
from mmeformer.tiff import Tiff


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


@pytest.fixture(autouse=True)
def warn_again(monkeypatch):
    monkeypatch.setattr(images, "_warned", False)


def test_gray_and_deep_images_become_three_channels(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 5), 200, np.uint8))
    cv2.imwrite(str(tmp_path / "b.tif"), np.full((4, 5), 200 << 8, np.uint16))
    cv2.imwrite(str(tmp_path / "c.png"), np.full((4, 5, 3), 200 << 8, np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a.png", "b.tif", "c.png"):
            assert (read_image(tmp_path / name) == 200).all()
            assert read_image(tmp_path / name).shape == (4, 5, 3)


@pytest.fixture
def sensor():
    """12 bits of red, green, blue and infrared, (40, 50, 4) uint16."""
    return np.random.default_rng(0).integers(0, 4096, (40, 50, 4), np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_that_would_be_nearly_black_are_named(tmp_path, sensor, suffix):
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), sensor[..., 2::-1])
    with pytest.warns(UserWarning, match=rf"{path} has 16 bits, .* stretch=\(0, 4095\)"):
        found = read_image(path)
    assert found.max() == 15
    heard = []
    read_image(path, on_dark=heard.append)
    assert len(heard) == 1
    expected = np.rint(sensor[..., 2::-1] * (255 / 4095))
    found = read_image(path, Reading(stretch=(0, 4095)), heard.append)
    assert np.abs(found - expected).max() <= 1 and len(heard) == 1
    found = read_image(path, Reading(stretch="percentile"))
    low, high = np.percentile(sensor[..., 0], (2, 98))
    expected = np.clip((sensor[..., 0] - low) * (255 / (high - low)), 0, 255)
    assert np.abs(found[..., 2] - expected).max() <= 1


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f4", "f8"])
def test_bands_are_chosen(tmp_path, sensor, dtype):
    image = np.concatenate([sensor, sensor[..., :1] // 2], 2).astype(dtype)
    path = write_tiff(tmp_path / "a.tif", image)
    with pytest.raises(ValueError, match=r"a.tif has 5 bands, .* bands=\(3, 2, 1\)"):
        read_image(path, Reading(stretch=(0, 4095)))
    with pytest.raises(ValueError, match="has only 5 bands"):
        read_image(path, Reading((6, 2, 1)))
    with pytest.raises(ValueError, match="has 4 bands"):
        read_image(write_tiff(tmp_path / "b.tif", image[..., :4]))
    if dtype not in ("u1", "u2"):
        with pytest.raises(ValueError, match=r"numbers of \d+ bits; say which values"):
            read_image(path, Reading((4, 1, 2)))
    found = read_image(path, Reading((4, 1, 2), None if dtype == "u1" else (0, 4095)))
    expected = image[..., [1, 0, 3]] * (1 if dtype == "u1" else 255 / 4095)
    assert np.abs(found - expected).max() <= 1
    gray = read_image(path, Reading((5,), (0, 4095)))
    assert (gray[..., 0] == gray[..., 2]).all()
    layout = read_layout(path)
    assert (layout.height, layout.width, layout.bands, layout.bits) == (
        40,
        50,
        5,
        8 * image.dtype.itemsize,
    )


def test_three_unmarked_bands_are_red_green_and_blue(tmp_path, sensor):
    image = (sensor[..., :3] >> 4).astype(np.uint8)
    for dtype, shift in ((np.uint8, 0), (np.uint16, 8)):
        path = write_tiff(tmp_path / "a.tif", image.astype(dtype) << shift)
        assert np.array_equal(read_image(path), image[..., ::-1])


def test_infrared_beside_marked_colors_is_left_out(tmp_path, sensor):
    path = write_tiff(tmp_path / "a.tif", sensor << 4, RGB)
    assert np.array_equal(read_image(path), sensor[..., 2::-1] >> 4)
    path = write_tiff(tmp_path / "b.tif", (sensor >> 4).astype(np.uint8), RGB)
    assert np.array_equal(read_image(path), sensor[..., 2::-1] >> 4)
    assert np.array_equal(read_image(path, Reading((4,)))[..., 0], sensor[..., 3] >> 4)


def test_pictures_stay_as_they_are(tmp_path, sensor):
    """Settings for raw imagery change no patches that were cut from it."""
    picture = (sensor[..., :3] >> 4).astype(np.uint8)
    opaque = np.full((40, 50, 1), 255, np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    cv2.imwrite(str(tmp_path / "b.bmp"), picture[..., ::-1])
    write_tiff(tmp_path / "c.tif", picture, RGB)
    write_tiff(tmp_path / "d.tif", picture)
    write_tiff(tmp_path / "e.tif", np.concatenate([picture, opaque], 2), RGB, extra=2)
    for path in sorted(tmp_path.iterdir()):
        found = read_image(path, Reading((4, 3, 2), (0, 4095)))
        assert np.array_equal(found, picture[..., ::-1]), path


def test_numbers_that_are_not_finite(tmp_path):
    image = np.array([[[0.0], [0.5], [1.0], [np.nan], [np.inf], [-np.inf]]], np.float32)
    path = write_tiff(tmp_path / "a.tif", image)
    assert read_image(path, Reading(stretch=(0, 1)))[0, :, 0].tolist() == [0, 128, 255, 0, 255, 0]
    read_image(path, Reading(stretch="percentile"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_deep_images_are_those_of_pictures(tmp_path, sensor, orientation):
    picture = (sensor[..., :3] >> 4).astype(np.uint8)
    shown = read_image(write_tiff(tmp_path / "a.tif", picture, RGB, orientation=orientation))
    deep = picture.astype(np.uint16) << 8
    path = write_tiff(tmp_path / "b.tif", deep, RGB, orientation=orientation)
    assert np.array_equal(read_image(path), shown)
    layout = read_layout(path)
    assert (layout.height, layout.width) == shown.shape[:2]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(tmp_path / "c.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "c.png"), shown)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(["u1", "u2", "u4", "i2", "i4", "f2", "f4", "f8"]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 6)),
    order=st.sampled_from("<>"),
    big=st.booleans(),
    separate=st.booleans(),
    tile=st.sampled_from([None, (32, 64)]),
    deflate=st.booleans(),
)
def test_every_layout_of_a_tiff_file(tmp_path_factory, data, dtype, shape, **layout):
    path = tmp_path_factory.getbasetemp() / "any.tif"
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    size = np.dtype(dtype).itemsize
    image = random.integers(0, 256, (*shape[:2], shape[2] * size), np.uint8).view(dtype)
    predictors = [1, 3 if np.dtype(dtype).kind == "f" else 2]
    if dtype == "f2":
        predictors = [1]
    predictor = data.draw(st.sampled_from(predictors)) if layout["deflate"] else 1
    write_tiff(path, image, predictor=predictor, **layout)
    bands = data.draw(st.lists(st.integers(0, shape[2] - 1), min_size=1, max_size=3))
    found = Tiff(path.read_bytes()).read(bands)
    assert found.dtype == np.dtype(dtype) and found.shape == (*shape[:2], len(bands))
    assert found.tobytes() == np.ascontiguousarray(image[..., bands]).tobytes()


def test_damaged_directories(tmp_path, sensor):
    path = write_tiff(tmp_path / "a.tif", sensor)
    content = path.read_bytes()
    for end in (4, 8, 20, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="a.tif cannot be read as an image"):
            read_image(path, Reading((1, 2, 3), (0, 4095)))


@pytest.mark.parametrize(
    "setting",
    [
        dict(bands=(1, 2)),
        dict(bands=(0, 1, 2)),
        dict(bands="rgb"),
        dict(stretch=(5, 5)),
        dict(stretch=5),
        dict(stretch="wide"),
        dict(stretch=(0, float("inf"))),
    ],
)
def test_invalid_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Reading(**setting)


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no image format has this suffix"):
        write_image(tmp_path / "a.docx", np.zeros((2, 2, 3), np.uint8))


def test_images_beyond_the_limits_of_opencv_are_named(tmp_path):
    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    # Black and white, so that the file is as large as this many pixels need.
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 33_000, 33_000, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(33_000 * (1 + 33_000 // 8))))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="a.png cannot be read by OpenCV, whose limits"):
        read_image(tmp_path / "a.png")
