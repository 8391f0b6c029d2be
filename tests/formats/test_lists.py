# SPDX-License-Identifier: Apache-2.0
"""Lists of images, such as VOC's ``ImageSets``, split as they say; what does not fit is named."""

import shutil

import labeled_sets as sets
import pytest
from PIL import Image

from mmeformer.formats.find import read_folder
from mmeformer.formats.tree import Options

TRAIN, VAL = sets.NAMES[:4], sets.NAMES[4:]
SPLIT = dict.fromkeys(TRAIN, "train") | dict.fromkeys(VAL, "val")


def read(root, **options):
    return read_folder(root, Options(**options))


def splits(data):
    """Split of each image, by its path below the root."""
    return {image.path.relative_to(data.root).as_posix(): image.split for image in data.images}


def by_stem(data):
    return {image.path.stem: image.split for image in data.images}


def write_lists(folder, form="{}\n", suffix=".txt", **more):
    """``train.txt`` and ``val.txt``; ``form`` is the line of a name."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in {"train": TRAIN, "val": VAL, **more}.items():
        (folder / f"{split}{suffix}").write_text("".join(map(form.format, names)))


@pytest.fixture
def voc(tmp_path):
    """A set of VOC and its lists."""
    return sets.write_voc(tmp_path), tmp_path / "ImageSets" / "Main"


class TestVoc:
    @pytest.mark.parametrize(
        "form",
        [
            "{}  -1\n",
            "{} 1\n",
            "{}.jpg\n",
            "{}.xml\n",
            "JPEGImages/{}.jpg\n",
            "C:\\data\\JPEGImages\\{}.jpg\n",
            "/elsewhere/photos/{}.jpg\n",
            "JPEGImages/{0}.jpg Annotations/{0}.xml\n",
        ],
    )
    def test_lines(self, voc, form):
        root, lists = voc
        write_lists(lists, form)
        # Lists of classes beside those of all images do not count, whatever they say.
        (lists / "boat_train.txt").write_text("egg 1\nfig -1\n")
        (lists / "boat_val.txt").write_text("apple 1\n")
        (lists / "trainval.txt").write_text("\n".join(sets.NAMES))
        data = read(root)
        assert by_stem(data) == SPLIT and not data.notes

    def test_lists_of_classes_alone(self, voc):
        """Each names all images; a class may have the name of a split."""
        root, lists = voc
        for split, names in (("train", TRAIN), ("val", VAL)):
            (lists / f"{split}.txt").unlink()
            for index, name in enumerate(("boat", "train")):
                lines = (f"{image}  {'-' * (index == k % 2)}1\n" for k, image in enumerate(names))
                (lists / f"{name}_{split}.txt").write_text("".join(lines))
        (lists / "boat_val.txt").write_text("egg  1\nfig -1\ngone 0\n")
        data = read(root)
        assert by_stem(data) == SPLIT
        assert data.notes == [
            "ImageSets/Main/boat_val.txt and 1 more: 1 of 3 names have no labeled image here, such "
            "as 'gone'"
        ]

    @pytest.mark.parametrize("name", ["2024.05.{}", "site {}", "{} 1", "{}.jpg"])
    def test_names_with_dots_and_spaces(self, voc, name):
        root, lists = voc
        for old in sets.NAMES:
            new = name.format(old)
            (root / "JPEGImages" / f"{old}.jpg").rename(root / "JPEGImages" / f"{new}.jpg")
            path = root / "Annotations" / f"{old}.xml"
            path.write_text(path.read_text().replace(f"{old}.jpg", f"{new}.jpg"))
            path.rename(path.with_name(f"{new}.xml"))
        for form in (f"{name}\n", f"{name} -1\n"):
            write_lists(lists, form)
            data = read(root)
            assert by_stem(data) == {name.format(old): split for old, split in SPLIT.items()}
            assert not data.notes

    def test_images_of_one_name_in_two_folders(self, tmp_path):
        for folder in ("camA", "camB"):
            sets.write_voc(make(tmp_path / folder))
            for part in ("JPEGImages", "Annotations"):
                shutil.move(tmp_path / folder / part, make(tmp_path / part) / folder)
            shutil.rmtree(tmp_path / folder)
        lists = make(tmp_path / "ImageSets" / "Main")
        (lists / "train.txt").write_text("".join(f"camA/{name}\n" for name in sets.NAMES))
        (lists / "val.txt").write_text("".join(f"camB/{name}\n" for name in sets.NAMES[1:]))
        data = read(tmp_path)
        assert splits(data) == {
            f"JPEGImages/{folder}/{name}.jpg": split
            for folder, split in (("camA", "train"), ("camB", "val"))
            for name in sets.NAMES
            if (folder, name) != ("camB", "apple")
        }
        shown = tmp_path / "JPEGImages/camB/apple.jpg"
        assert data.notes == [f"1 images belong to no split and are left out, such as {shown}"]
        # A listed image that is gone is not the one of that name in another folder.
        (tmp_path / "JPEGImages/camB/bread.jpg").unlink()
        (tmp_path / "Annotations/camB/bread.xml").unlink()
        data = read(tmp_path)
        assert splits(data)["JPEGImages/camA/bread.jpg"] == "train"
        assert data.notes[0] == (
            "ImageSets/Main/val.txt: 1 of 5 names have no labeled image here, such as 'camB/bread'"
        )
        # A bare name is that of both.
        write_lists(lists)
        assert splits(read(tmp_path))["JPEGImages/camB/egg.jpg"] == "val"

    def test_two_years(self, tmp_path):
        """Each set has its own lists; a name that only the other set has is missing."""
        for year in ("VOC2007", "VOC2012"):
            sets.write_voc(make(tmp_path / year))
        lists = tmp_path / "VOC2012/ImageSets/Main"
        (lists / "train.txt").write_text("\n".join(VAL))
        (lists / "val.txt").write_text("\n".join(TRAIN))
        (tmp_path / "VOC2012/Annotations/apple.xml").unlink()
        data = read(tmp_path)
        other = {"train": "val", "val": "train"}
        assert splits(data) == {
            f"{year}/JPEGImages/{name}.jpg": split if year == "VOC2007" else other[split]
            for year in ("VOC2007", "VOC2012")
            for name, split in SPLIT.items()
            if (year, name) != ("VOC2012", "apple")
        }
        assert data.notes[0] == (
            "VOC2012/ImageSets/Main/val.txt: 1 of 4 names have no labeled image here, such as "
            "'apple'"
        )

    def test_names_without_an_image_or_annotation(self, voc):
        root, lists = voc
        write_lists(lists, test=["gone"])
        with (lists / "train.txt").open("a") as file:
            file.write("lost\nlost too\n")
        (root / "Annotations" / "egg.xml").unlink()
        data = read(root)
        assert by_stem(data) == {name: split for name, split in SPLIT.items() if name != "egg"}
        assert data.notes == [
            "ImageSets/Main/train.txt: 2 of 6 names have no labeled image here, such as 'lost'",
            "ImageSets/Main/val.txt: 1 of 2 names have no labeled image here, such as 'egg'",
            "ImageSets/Main/test.txt: 1 of 1 names have no labeled image here, such as 'gone'",
            "1 images have no annotation file and are left out, such as JPEGImages/egg.jpg",
        ]

    def test_images_of_two_splits_train(self, voc):
        """Else training images would validate, or the other way round by the order of files."""
        root, lists = voc
        write_lists(lists, valid=["apple", "date", "egg"])
        data = read(root)
        assert by_stem(data) == SPLIT
        assert data.notes == [
            "ImageSets/Main/valid.txt: 2 of its images are for train by ImageSets/Main/train.txt, "
            "and count there, such as JPEGImages/apple.jpg"
        ]

    def test_lists_of_other_tasks_do_not_count(self, voc):
        root, lists = voc
        for task in ("Segmentation", "Layout"):
            write_lists(lists.with_name(task), val=TRAIN, train=VAL)
        data = read(root)
        assert by_stem(data) == SPLIT and not data.notes
        shutil.rmtree(lists)
        assert by_stem(read(root))["egg"] == "train"

    def test_training_and_validation_in_one_list(self, voc):
        root, lists = voc
        for split in ("train", "val"):
            (lists / f"{split}.txt").unlink()
        (lists / "trainval.txt").write_text("apple\nbread\ncheese\ngone\n")
        (lists / "test.txt").write_text("egg\n")
        data = read(root)
        assert by_stem(data).keys() == {"apple", "bread", "cheese", "egg"}
        assert by_stem(data)["egg"] == "test" and len(data.of_split("val")) == 1
        first, second, *_ = data.notes
        assert first.endswith(
            "trainval.txt: 1 of 4 names have no labeled image here, such as 'gone'"
        )
        assert "2 images belong to no split" in second

    def test_capital_letters(self, voc):
        root, lists = voc
        shutil.rmtree(lists)
        write_lists(root / "imagesets" / "main", "{}.JPG\n", ".TXT")
        (root / "imagesets/main/train.TXT").rename(root / "imagesets/main/Train.TXT")
        assert by_stem(read(root)) == SPLIT


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def yolo(root):
    """Without folders of splits."""
    sets.write_yolo(root, yaml_file=False)
    for part in ("images", "labels"):
        for path in sorted((root / part).glob("*/*")):
            path.rename(root / part / path.name)
        for split in ("train", "val"):
            (root / part / split).rmdir()
    (root / "classes.txt").write_text("boat\ncar\n")
    return root


def masks(root):
    sets.write_masks(root)
    for part in ("images", "masks"):
        for path in sorted((root / part).glob("*/*")):
            path.rename(root / part / path.name)
    return root


def coco(root):
    sets.write_coco(root)
    return root


def voc_without_lists(root):
    sets.write_voc(root)
    shutil.rmtree(root / "ImageSets")
    return root


@pytest.mark.parametrize(
    "write",
    [
        yolo,
        coco,
        voc_without_lists,
        sets.write_labelme,
        lambda root: sets.write_dota(root, splits=False),
        masks,
        lambda root: sets.write_folders(root, splits=False),
    ],
    ids=["yolo", "coco", "voc", "labelme", "dota", "masks", "folders"],
)
@pytest.mark.parametrize("place", [".", "splits", "ImageSets", "ImageSets/Main"])
def test_lists_of_every_format(tmp_path, write, place):
    write(tmp_path)
    write_lists(tmp_path / place)
    with (tmp_path / place / "val.txt").open("a") as file:
        file.write("gone\n")
    data = read(tmp_path)
    assert by_stem(data) == SPLIT
    shown = (tmp_path / place / "val.txt").relative_to(tmp_path)
    assert f"{shown}: 1 of 3 names have no labeled image here, such as 'gone'" in data.notes


def test_folders_count_more_than_loose_lists(tmp_path):
    sets.write_dota(tmp_path)
    write_lists(tmp_path, train=VAL, val=TRAIN)
    data = read(tmp_path)
    assert by_stem(data) == SPLIT and not data.notes


def test_lists_of_class_folders(tmp_path):
    """As of Food-101: ``meta/train.txt`` with ``boat/apple``; names repeat in the classes."""
    for name in ("boat", "car"):
        for number in range(4):
            path = make(tmp_path / "images" / name) / f"{number}.jpg"
            Image.new("RGB", (16, 12)).save(path)
    meta = make(tmp_path / "meta")
    (meta / "train.txt").write_text("boat/0\nboat/1\ncar/2\ncar/3\n")
    (meta / "test.txt").write_text("boat/2\nboat/3\ncar/0\ncar/1\n")
    data = read(tmp_path)
    test = {path for path, split in splits(data).items() if split == "test"}
    assert test == {f"images/{name}.jpg" for name in ("boat/2", "boat/3", "car/0", "car/1")}


def test_label_files_are_no_lists(tmp_path):
    """An image may be called ``train``."""
    yolo(tmp_path)
    for folder, suffix in (("images", "jpg"), ("labels", "txt")):
        (tmp_path / folder / f"apple.{suffix}").rename(tmp_path / folder / f"train.{suffix}")
    data = read(tmp_path)
    assert len(data.images) == 6 and all("names have no" not in note for note in data.notes)
