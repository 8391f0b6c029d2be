# SPDX-License-Identifier: Apache-2.0
"""Splits: near copies of one image never train and validate, and a seed decides the rest."""

from pathlib import Path

import pytest

from mmeformer.formats import splits
from mmeformer.labeled import BOXES, FOLDERS, LabeledData, LabeledImage, LabeledObject


def data_of(names, split=None, labels=None):
    images = [
        LabeledImage(
            Path("data", str(labels[i]) if labels else "", f"{name}.png"),
            *(8, 8),
            split=split,
            label=labels[i] if labels else None,
        )
        for i, name in enumerate(names)
    ]
    kind = FOLDERS if labels else BOXES
    return LabeledData("format", Path("data"), kind, ("a", "b"), images)


def parts(data):
    return {
        split: [image.path.stem for image in data.of_split(split)] for split in ("train", "val")
    }


FRAMES = [f"clip{video}_{frame:04d}" for video in "abcdefghij" for frame in range(9)]
TILES = [f"scene{i}__1024__{x}___{y}" for i in range(8) for x in (0, 512) for y in (0, 512)]
GRID = [f"field{i}_{x}_{y}" for i in "pqrstu" for x in (0, 512) for y in (0, 512)]
VIDEOS = [f"{v}_mp4-{i:04d}_jpg.rf.{ord(v) * 99 + i:032x}" for v in "abcdefgh" for i in range(9)]
COPIES = [f"pic{i}_jpg.rf.{n:032x}" for i in "abcdefgh" for n in range(3)]


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (FRAMES, lambda name: name[:5]),
        (TILES, lambda name: name.split("__")[0]),
        (GRID, lambda name: name[:6]),
        (COPIES, lambda name: name.split("_")[0]),
        (VIDEOS, lambda name: name[0]),
    ],
    ids=["frames", "tiles", "grid", "copies", "videos"],
)
def test_near_copies_stay_together(names, group):
    data = data_of(names)
    splits.complete(data, seed=0)
    found = parts(data)
    assert not {group(n) for n in found["train"]} & {group(n) for n in found["val"]}
    assert sorted(found["train"] + found["val"]) == sorted(names)
    assert 0.1 <= len(found["val"]) / len(names) <= 0.3
    assert "seed 0" in data.notes[0]


def test_numbers_alone_tell_no_scenes():
    data = data_of([f"IMG_{number}" for number in range(50)])
    splits.complete(data, seed=0)
    assert len(parts(data)["val"]) == 10 and "one by one" in data.notes[0]


def in_folders(names_of, folders="abcd", label=None):
    """A data set of images ``data/FOLDER/NAME.png``."""
    images = [
        LabeledImage(Path("data", folder, f"{name}.png"), 8, 8, label=label)
        for folder in folders
        for name in names_of(folder)
    ]
    return LabeledData("format", Path("data"), BOXES, ("a", "b"), images)


def folders_of(data, split):
    return {image.path.parent.name for image in data.of_split(split)}


@pytest.mark.parametrize(
    "names_of",
    [
        lambda folder: [f"{n:04d}" for n in range(10)],
        lambda folder: [f"frame_{n}" for n in range(10)],
        lambda folder: [f"tile_{x}_{y}" for x in (0, 512) for y in (0, 512)],
        lambda folder: [f"cam{cam}_{n}" for cam in range(5) for n in range(6)],
        lambda folder: [f"IMG_{ord(folder) * 50 + n}" for n in range(10)],
    ],
    ids=["numbers", "frames", "tiles", "cameras", "numbers that go on"],
)
def test_numbered_images_in_folders_are_scenes(names_of):
    data = in_folders(names_of)
    splits.complete(data, seed=0)
    assert len(folders_of(data, "val")) == 1 and len(folders_of(data, "train")) == 3
    assert not folders_of(data, "train") & folders_of(data, "val")
    assert data.notes[0].endswith("by folder, as one scene or video: 4 folders")


def test_one_video_in_several_folders_stays_together():
    data = in_folders(lambda folder: [f"clip{n // 5}_{ord(folder) * 99 + n}" for n in range(50)])
    splits.complete(data, seed=0)
    clips = [{image.path.stem[:5] for image in data.of_split(s)} for s in ("train", "val")]
    assert not clips[0] & clips[1] and "one scene or video: 10 prefixes" in data.notes[0]


def test_names_that_are_no_numbers_tell_no_scenes():
    data = in_folders(lambda folder: [f"{folder}{word}" for word in ("sun", "moon", "sea", "hill")])
    splits.complete(data, seed=0)
    assert "one by one" in data.notes[0] and len(data.of_split("val")) == 3


def test_two_cameras_of_one_scene():
    """Too few folders: images of one number stay together, and nothing claims more."""
    data = in_folders(lambda folder: [f"{n:04d}" for n in range(20)], ["left", "right"])
    splits.complete(data, seed=0)
    names = [sorted(image.path.stem for image in data.of_split(s)) for s in ("train", "val")]
    assert not set(names[0]) & set(names[1]) and len(names[1]) == 8
    assert "one by one (their names tell no scenes" in data.notes[0]
    assert "images of one name stay together" in data.notes[0]


def test_scenes_below_class_folders():
    """``cat/morning/0001.png``: folders of a class are scenes, unlike the folder of a class."""
    data = in_folders(lambda folder: [f"{n:04d}" for n in range(10)], "abcde", label=0)
    other = in_folders(lambda folder: [f"{n:04d}" for n in range(30)], "z", label=1)
    data.images += other.images
    splits.complete(data, seed=0)
    assert len(folders_of(data, "val") - {"z"}) == 1
    assert folders_of(data, "train") & folders_of(data, "val") == {"z"}
    assert data.counts("val") == {0: 10, 1: 6}


def test_the_seed_decides():
    chosen = []
    for seed in (0, 0, 1):
        data = data_of([f"IMG_{number}" for number in range(50)])
        splits.complete(data, seed)
        chosen.append(parts(data)["val"])
    assert chosen[0] == chosen[1] != chosen[2]


def test_classes_of_images_are_split_alike():
    labels = [0] * 40 + [1] * 10
    data = data_of([f"x{'abcdefghij'[i % 10]}{i}" for i in range(50)], labels=labels)
    splits.complete(data, seed=0)
    counts = data.counts("val")
    assert counts[0] == 8 and counts[1] == 2


@pytest.mark.parametrize(
    "name",
    [
        lambda label, number: f"{'abcde'[label]}at_{number}",
        lambda label, number: f"image_{number:04d}",
        lambda label, number: f"{number:03d}",
        lambda label, number: f"{'abcde'[label]}at_{number}.rf.{number * 5 + label:032x}",
    ],
    ids=["class and number", "same names", "numbers", "class, number and hash"],
)
def test_names_of_classes_are_no_scenes(name):
    """The images of a class have its name, or those of all classes the same names."""
    labels = [label for label in range(5) for _ in range(10)]
    names = [name(label, index % 10) for index, label in enumerate(labels)]
    data = data_of(names, labels=labels)
    splits.complete(data, seed=0)
    assert data.counts("val") == dict.fromkeys(range(5), 2) and data.counts("train")[4] == 8
    assert "from every class alike" in data.notes[0]


def test_frames_in_class_folders_stay_together():
    """Of videos that show one class after the other, beside a class that is one video."""
    names = [*FRAMES, *(f"rare_{number}" for number in range(6))]
    labels = [index % 2 for index in range(len(FRAMES))] + [2] * 6
    data = data_of(names, labels=labels)
    splits.complete(data, seed=0)
    found = parts(data)
    assert not {n[:5] for n in found["train"]} & {n[:5] for n in found["val"]} - {"rare_"}
    assert data.counts("val")[2] == 1 and "one scene or video: 10 prefixes" in data.notes[0]


def test_a_split_of_the_user_stays():
    data = data_of(FRAMES, "train")
    for image in data.images[::2]:
        image.split = "val"
    before = parts(data)
    splits.complete(data, seed=0)
    assert parts(data) == before and not data.notes


def test_validation_is_taken_from_training_only():
    data = data_of(FRAMES, "train")
    for image in data.images[-9:]:
        image.split = "test"
    splits.complete(data, seed=0)
    assert len(data.of_split("test")) == 9 and 9 <= len(data.of_split("val")) <= 18


def test_images_outside_of_the_split_are_left_out():
    data = data_of(FRAMES, "train")
    data.images[0].split = "val"
    data.images[1].split = None
    splits.complete(data, seed=0)
    assert len(data.images) == len(FRAMES) - 1 and "1 images belong to no split" in data.notes[0]


def test_unlabeled_test_images_are_left_out():
    """Such as those of a competition: all would count as empty."""
    data = data_of(FRAMES, "train")
    for image in data.images[:-9]:
        image.objects = [LabeledObject(0, (1.0, 1.0, 2.0, 2.0))]
    for image in data.images[-9:]:
        image.split = "test"
    splits.complete(data, seed=0)
    assert not data.of_split("test") and data.of_split("val")
    assert data.notes[0] == "the 9 test images have no labels and are left out"


def test_one_image():
    data = data_of(["only"])
    splits.complete(data, seed=0)
    assert parts(data) == dict(train=["only"], val=["only"]) and "one image" in data.notes[0]
