# SPDX-License-Identifier: Apache-2.0
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from mmeformer.checks.images import decode_fault, quick_fault, read_header
from mmeformer.images import read_image


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(params=["png", "jpg"])
def path(request, tmp_path, picture):
    path = tmp_path / f"picture.{request.param}"
    cv2.imwrite(str(path), picture)
    return path


def test_whole(path):
    assert quick_fault(path) is None and decode_fault(path) is None
    header = read_header(path)
    assert (header.height, header.width) == (40, 60)


def test_cut_off_files_are_known_without_decoding(path):
    content = path.read_bytes()
    for kept in (1, 9, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        assert decode_fault(path), kept
        if kept > 8:
            assert "copy it again" in quick_fault(path)


def test_opencv_itself_would_decode_half_a_picture(tmp_path, picture):
    path = tmp_path / "picture.jpg"
    cv2.imwrite(str(path), picture)
    path.write_bytes(path.read_bytes()[:2000])
    assert cv2.imread(str(path)) is not None
    assert quick_fault(path)


def test_more_after_the_end_is_no_fault(path):
    path.write_bytes(path.read_bytes() + b"camera's own" * 100)
    assert quick_fault(path) is None and decode_fault(path) is None


@pytest.mark.parametrize("progressive", [False, True])
def test_trailers_and_previews_of_jpeg(tmp_path, picture, progressive):
    """Motion photos have a video behind the end; previews have an end of their own."""
    large = cv2.resize(picture, (600, 400))
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    content = cv2.imencode(".jpg", large, options)[1].tobytes()
    preview = cv2.imencode(".jpg", picture)[1].tobytes()
    exif = b"Exif\0\0" + preview
    content = content[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + content[2:]
    path = tmp_path / "picture.jpg"
    for trailer in (b"", b"\0" * 100_000, b"video" * 40_000):
        path.write_bytes(content + trailer)
        assert quick_fault(path) is None and decode_fault(path) is None
        assert read_image(path).shape == (400, 600, 3)
    for share in (0.3, 0.55, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        assert "truncated" in quick_fault(path)
        with pytest.raises(ValueError, match="cannot be read as an image"):
            read_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"<html>not found</html>", "is not an image"), (None, "does not exist")],
)
def test_no_images(tmp_path, content, message):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    assert message in decode_fault(path)


def test_header_has_the_size_after_rotation(tmp_path, picture):
    path = tmp_path / "picture.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture).save(path, exif=exif)
    header = read_header(path)
    assert (header.height, header.width) == cv2.imread(str(path)).shape[:2] == (60, 40)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P", "1"])
def test_unusual_pictures_are_whole(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    if mode == "I;16":
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(path)
    else:
        Image.new(mode, (30, 20)).save(path)
    assert decode_fault(path) is None
    header = read_header(path)
    assert (header.height, header.width) == (20, 30)
    assert header.layout is None or (header.layout.bits > 8) == (mode == "I;16")


def _chunk(name: bytes, content: bytes) -> bytes:
    size, code = len(content), zlib.crc32(name + content)
    return struct.pack(">I", size) + name + content + struct.pack(">I", code)


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", [b"eXIf", b"tEXt"])
def test_png_is_turned_as_by_opencv_without_decoding_it(tmp_path, monkeypatch, place, kind):
    exif = Image.Exif()
    exif[274] = 6
    content = exif.tobytes()
    plain = content.removeprefix(b"Exif\0\0")
    text = b"Raw profile type exif\0\nexif\n%8d\n" % len(content) + content.hex().encode()
    path = tmp_path / "image.png"
    Image.new("RGB", (30, 20)).save(path)
    data = path.read_bytes()
    at = data.index(place) - 4
    path.write_bytes(data[:at] + _chunk(kind, plain if kind == b"eXIf" else text) + data[at:])
    shape = cv2.imread(str(path)).shape[:2]

    def decode(image):
        raise AssertionError("the pixels are decoded")

    monkeypatch.setattr(PngImageFile, "load", decode)
    header = read_header(str(path))
    assert (header.height, header.width) == shape == ((30, 20) if kind == b"eXIf" else (20, 30))
