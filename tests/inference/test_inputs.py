# SPDX-License-Identifier: Apache-2.0
"""What inputs stand for, and that only whole images and videos pass."""

import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from mmeformer.inference.inputs import Source, find_sources, read
from mmeformer.inference.videos import Video, is_unfinished


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def described(sources):
    return [(source.file_name, source.name, source.is_video) for source in sources]


def test_files_folders_globs_and_videos(tmp_path):
    touch(tmp_path, "a.PNG", "b/c.jpg", "b/d/e.tif", "b/f.mp4", "b/notes.txt", "b/.hidden.png")
    touch(tmp_path, "b/.cache/x.png", "strange.dat")
    assert described(find_sources([tmp_path])) == [
        ("a.PNG", "a", False),
        ("b/c.jpg", "b/c", False),
        ("b/d/e.tif", "b/d/e", False),
        ("b/f.mp4", "b/f", True),
    ]
    # A file counts whatever its suffix, each only once, in the order given.
    inputs = [tmp_path / "strange.dat", f"{tmp_path}/b/*", tmp_path / "b" / "c.jpg"]
    assert described(find_sources(inputs)) == [
        ("strange.dat", "strange", False),
        ("c.jpg", "c", False),
        ("d/e.tif", "d/e", False),
        ("f.mp4", "f", True),
    ]
    found = find_sources([f"{tmp_path}/**/*.tif"])
    assert described(found) == [("b/d/e.tif", "b/d/e", False)]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    touch(tmp_path, "a[1].png")
    assert described(find_sources([tmp_path / "a[1].png"])) == [("a[1].png", "a[1]", False)]


def test_outputs_of_an_earlier_run_are_no_inputs(tmp_path):
    touch(tmp_path, "a.png", "out/pictures/a.jpg", "out/masks/a.png", "out/b.png")
    exclude = [tmp_path / "out" / "pictures", tmp_path / "out" / "masks"]
    expected = ["a.png", "out/b.png"]
    for inputs in ([tmp_path], [f"{tmp_path}/*"], [f"{tmp_path}/**/*.*"]):
        assert sorted(source.file_name for source in find_sources(inputs, exclude)) == expected


def test_names_are_unique(tmp_path):
    touch(tmp_path, "one/a.png", "one/a.jpg", "two/a.png", "two/b.png")
    assert [source.name for source in find_sources([tmp_path / "one"])] == ["a.jpg", "a.png"]
    found = find_sources([tmp_path / "one" / "a.png", tmp_path / "two"])
    assert described(found) == [
        ("one/a.png", "one/a", False),
        ("two/a.png", "two/a", False),
        ("two/b.png", "two/b", False),
    ]
    assert len(find_sources([tmp_path])) == 4


def test_names_that_cannot_be_told_apart_are_named(tmp_path):
    touch(tmp_path, "a.png", "a.jpg", "a.png.png")
    with pytest.raises(ValueError, match=r"a.png and .*a.png.png would have the same name"):
        find_sources([tmp_path])
    touch(tmp_path, "videos/clip.mp4", "videos/clip/000001.png")
    with pytest.raises(ValueError, match=r"clip.mp4 and .*000001.png would have the same name"):
        find_sources([tmp_path / "videos"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("gone.png", FileNotFoundError, "gone.png does not exist"),
        ("gone/", FileNotFoundError, "gone does not exist"),
        ("empty", ValueError, r"empty has no image or video \(.bmp"),
        ("empty/*.png", ValueError, r"no image or video matches .*empty/\*.png"),
    ],
)
def test_inputs_that_stand_for_nothing(tmp_path, given, error, message):
    touch(tmp_path, "empty/notes.txt")
    with pytest.raises(error, match=message):
        find_sources([f"{tmp_path}/{given}"])


def test_the_number_of_a_camera_is_answered():
    with pytest.raises(FileNotFoundError, match="input 0 does not exist; for a camera: mmeformer"):
        find_sources(["0"])


def pictures(folder):
    """Kinds of images that occur, (path, expected size)."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    for mode in ("L", "RGBA", "RGB", "P", "1"):
        Image.fromarray(pixels).convert(mode).save(folder / f"{mode}.png")
        yield folder / f"{mode}.png", (24, 40)
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")
    yield folder / "cmyk.jpg", (24, 40)
    cv2.imwrite(str(folder / "16.png"), pixels.astype(np.uint16) * 257)
    yield folder / "16.png", (24, 40)
    for height, width in ((1, 1), (20, 20000)):
        cv2.imwrite(str(folder / f"{height}.png"), np.zeros((height, width), np.uint8))
        yield folder / f"{height}.png", (height, width)


def test_every_kind_of_image_is_read_as_three_channels(tmp_path):
    for path, size in pictures(tmp_path):
        image = read(Source(path, path.name, path.stem))
        assert image.dtype == np.uint8 and image.shape == (*size, 3)


def test_bad_images_are_named(tmp_path):
    whole = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    png = whole[1].tobytes()
    jpg = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    contents = {
        "empty.png": b"",
        "text.jpg": b"hello, this is no image",
        "cut.png": png[: len(png) // 2],
        "cut.jpg": jpg[: len(jpg) // 2],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    for name in [*contents, "folder.png", "gone.png"]:
        with pytest.raises(ValueError, match=name):
            read(Source(tmp_path / name, name, name))


@pytest.fixture
def clip(tmp_path):
    """A video of 20 frames whose brightness tells their number."""
    path = tmp_path / "clip.mkv"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (64, 48))
    for index in range(20):
        writer.write(np.full((48, 64, 3), index * 10, np.uint8))
    writer.release()
    return path


def test_frames_of_a_video(clip):
    video = Video(clip)
    assert (video.fps, video.expected) == (12.5, 20)
    frames = list(video)
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 20
    np.testing.assert_allclose([frame.mean() for frame in frames], np.arange(20) * 10, atol=3)


def test_videos_that_are_cut_off_or_none(clip, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"text.mp4 cannot be read as a video"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match=r"empty.mp4 is empty"):
        Video(tmp_path / "empty.mp4")
    # The header promises 20 frames; half of the rest is gone.
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    seen = []
    with pytest.raises(ValueError, match=r"only \d+ of 20 frames"):
        for frame in Video(clip):
            seen.append(frame)
    assert 0 < len(seen) < 18


DURATION, VOID = b"\x44\x89\x88", b"\xec\x89\x88"


def test_videos_without_a_number_of_frames(clip):
    """Live recordings of browsers have neither a duration nor a length."""
    content = clip.read_bytes()
    assert content.count(DURATION) == 1
    clip.write_bytes(content.replace(DURATION, VOID))
    video = Video(clip)
    assert video.expected == 0 and len(list(video)) == 20


def test_finished_videos_whose_sound_is_longer(clip):
    content = clip.read_bytes()
    place = content.index(DURATION) + 3
    (duration,) = struct.unpack(">d", content[place : place + 8])
    longer = content[:place] + struct.pack(">d", 3 * duration) + content[place + 8 :]
    clip.write_bytes(longer)
    video = Video(clip)
    assert video.expected == 60 and len(list(video)) == 20
    clip.write_bytes(longer[: len(longer) // 2])
    with pytest.raises(ValueError, match=r"only \d+ of 60 frames"):
        list(Video(clip))


def box(kind, content=b"", length=None):
    return struct.pack(">I", 8 + len(content) if length is None else length) + kind + content


def test_ends_of_containers(tmp_path):
    path = tmp_path / "a.mp4"
    start = box(b"ftyp", b"isom")
    for content, expected in (
        (start + box(b"moov", b"1234") + box(b"mdat", b"12"), True),  # all frames were counted
        (start + box(b"moof", b"1234") + box(b"mdat", b"12"), False),
        (start + box(b"moof", b"1234") + box(b"mdat", b"12", 40), True),
        (start + box(b"moof") + struct.pack(">I4sQ", 1, b"mdat", 20) + b"1234", False),
        (start + box(b"moof") + struct.pack(">I4sQ", 1, b"mdat", 21) + b"1234", True),
        (start + box(b"moof") + box(b"mdat", b"12", 0), False),
    ):
        path.write_bytes(content)
        assert is_unfinished(path) == expected
    for length, expected in ((b"\x84", False), (b"\x85", True), (b"\x01" + b"\xff" * 7, False)):
        path.write_bytes(b"\x1a\x45\xdf\xa3\x81 \x18\x53\x80\x67" + length + b"1234")
        assert is_unfinished(path) == expected
