# SPDX-License-Identifier: Apache-2.0
"""Each error in masks and images is found and named; correct data passes."""

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image

from mmeformer.checks.findings import ERROR, WARNING, format_findings
from mmeformer.segmentation import ADE20KDataset, SegmentationDataset
from mmeformer.segmentation.checks import check_pairs, find_masks_without_image

CLASSES = ("sky", "road", "car")
SIZE = (12, 16)  # height, width


class Folder:
    """Images and masks in mmseg's layout, three sound ones to begin with."""

    def __init__(self, root):
        self.root = root
        (root / "images").mkdir()
        (root / "masks").mkdir()
        for index in range(3):
            self.add(f"good{index}", [0, 1, 2, 255])

    def add(self, name, values=None, mask=None, size=SIZE):
        """Add a pair whose mask holds ``values``, or ``mask`` itself."""
        height, width = size
        Image.new("RGB", (width, height), (10, 200, 30)).save(self.image(name))
        if mask is None:
            repeated = np.resize(np.array(values), SIZE)
            mask = Image.fromarray(repeated.astype(np.uint8))
        mask.save(self.mask(name))

    def image(self, name):
        return self.root / "images" / f"{name}.jpg"

    def mask(self, name):
        return self.root / "masks" / f"{name}.png"

    def pairs(self):
        images = sorted((self.root / "images").iterdir())
        return [(str(path), str(self.mask(path.stem))) for path in images]

    def check(self, classes=CLASSES, reduce_zero_label=False, **kwargs):
        return check_pairs(self.pairs(), classes, reduce_zero_label=reduce_zero_label, **kwargs)

    def dataset(self, cls=SegmentationDataset, **kwargs):
        settings = dict(
            data_root=str(self.root),
            data_prefix=dict(img_path="images", seg_map_path="masks"),
            pipeline=[dict(type="LoadAnnotations")],
        )
        if cls is SegmentationDataset:
            settings["metainfo"] = dict(classes=CLASSES)
        return cls(**{**settings, **kwargs})


@pytest.fixture(autouse=True)
def scope():
    """Transforms are mmseg's."""
    init_default_scope("mmseg")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def only(findings):
    """The one finding there is."""
    assert len(findings) == 1, format_findings(findings)
    return findings[0]


def test_sound_data_has_no_findings(folder):
    folder.add("palette", mask=Image.fromarray(np.full(SIZE, 2, np.uint8)).convert("P"))
    folder.add("bits", mask=Image.new("1", SIZE[::-1], 1))
    folder.add("wide", mask=Image.fromarray(np.full(SIZE, 1, np.uint16)))
    assert folder.check() == []
    assert find_masks_without_image(folder.pairs(), str(folder.root / "masks"), ".png") == []


def test_label_out_of_range(folder):
    folder.add("bad", [0, 1, 7])
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (ERROR, "label out of range")
    assert finding.path == str(folder.mask("bad"))
    assert "has 7 (64 pixels)" in finding.message
    assert "from 0 to 2" in finding.message


def test_label_out_of_range_of_16_bits(folder):
    """mmseg cuts masks to 8 bits: 256 would silently become class 0."""
    folder.add("bad", mask=Image.fromarray(np.full(SIZE, 256, np.uint16)))
    finding = only(folder.check())
    assert (finding.kind, finding.path) == ("label out of range", str(folder.mask("bad")))


def test_jpeg_masks_are_explained(folder):
    labels = np.resize(np.array([0, 250], np.uint8), SIZE)
    path = folder.root / "masks" / "bad.jpg"
    Image.fromarray(labels).save(path)
    pairs = [(str(folder.image("good0")), str(path))]
    assert "JPEG" in only(check_pairs(pairs, CLASSES, reduce_zero_label=False)).message


def test_classes_count_from_one_but_zero_is_not_reduced(folder):
    folder.add("bad", [0, 1, 2, 3])
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (ERROR, "reduce_zero_label")
    assert finding.path == str(folder.mask("bad"))
    assert "reduce_zero_label=True" in finding.message
    assert folder.check(reduce_zero_label=True) == []


def test_classes_count_from_zero_but_zero_is_reduced(folder):
    finding = only(folder.check(reduce_zero_label=True))
    assert (finding.severity, finding.kind) == (ERROR, "reduce_zero_label")
    assert "reduce_zero_label=False" in finding.message
    # A validation set, and a part of the data, may well lack a class.
    for kwargs in (dict(training=False), dict(limit=2)):
        assert only(folder.check(reduce_zero_label=True, **kwargs)).severity == WARNING


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_binary_masks_of_0_and_255(tmp_path, reduce_zero_label):
    folder = Folder(tmp_path)
    for index in range(3):
        folder.add(f"good{index}", [0, 255])
    finding = only(
        folder.check(classes=("background", "object"), reduce_zero_label=reduce_zero_label)
    )
    assert (finding.severity, finding.kind) == (ERROR, "0/255 masks")
    assert finding.path == str(folder.mask("good0"))
    assert "Save 255 as 1" in finding.message
    assert ("reduce_zero_label=False" in finding.message) == reduce_zero_label


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reduce_zero_label", [False, True])
@pytest.mark.parametrize("values", [[0, 1], [0, 255], [0, 1, 255]])
def test_one_class_is_never_learned(tmp_path, values, reduce_zero_label, training):
    """A softmax over one class is always 1; the advice given must work."""
    folder = Folder(tmp_path)
    for index in range(3):
        folder.add(f"good{index}", values)
    finding = only(folder.check(("blob",), reduce_zero_label=reduce_zero_label, training=training))
    assert (finding.severity, finding.kind) == (ERROR, "one class")
    assert "classes=('background', 'blob') with reduce_zero_label=False" in finding.message
    assert ("If 255 is 'blob', save it as 1" in finding.message) == (255 in values)
    for index in range(3):
        folder.add(f"good{index}", [1 if value == 255 else value for value in values])
    assert folder.check(("background", "blob"), training=training) == []


@pytest.mark.parametrize("values", [[0], [1, 255], [255]])
def test_all_masks_of_one_value(tmp_path, values):
    folder = Folder(tmp_path)
    for index in range(3):
        folder.add(f"good{index}", values)
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (ERROR, "nothing to tell apart")
    assert ("the one class" if values != [255] else "no class") in finding.message
    # Part of the data may be so.
    assert all(found.severity == WARNING for found in folder.check(limit=2))
    assert all(found.severity == WARNING for found in folder.check(training=False))


def test_mask_without_labels(folder):
    folder.add("empty", [255])
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (WARNING, "nothing labeled")
    assert finding.path == str(folder.mask("empty"))


def test_unused_class(folder):
    classes = (*CLASSES, "tree", "bus")
    finding = only(folder.check(classes=classes))
    assert (finding.severity, finding.kind) == (WARNING, "unused class")
    assert "['tree', 'bus']" in finding.message
    assert folder.check(classes=classes, training=False) == []


def test_image_without_mask(folder):
    folder.add("bad", [0])
    folder.mask("bad").unlink()
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (ERROR, "missing mask")
    assert finding.path == str(folder.image("bad"))
    assert str(folder.mask("bad")) in finding.message


def test_missing_masks_are_found_beyond_the_limit(folder):
    folder.mask("good2").unlink()
    assert only(folder.check(limit=1)).kind == "missing mask"


def test_mask_without_image(folder):
    folder.add("stray", [0])
    folder.image("stray").unlink()
    finding = only(find_masks_without_image(folder.pairs(), str(folder.root / "masks"), ".png"))
    assert (finding.severity, finding.kind) == (WARNING, "mask without image")
    assert finding.path == str(folder.mask("stray"))


def test_size_mismatch(folder):
    folder.add("bad", [0], size=(16, 12))
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (ERROR, "size mismatch")
    assert "16 x 12 px" in finding.message and "12 x 16 px" in finding.message


def test_size_of_an_image_stored_on_its_side(folder):
    """OpenCV turns such an image while it reads it, so its mask must fit the turned one."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", SIZE).save(folder.image("good0"), exif=exif)  # stored 12 wide, 16 high
    assert folder.check() == []


def test_color_mask(folder):
    folder.add("bad", mask=Image.new("RGB", SIZE[::-1], (128, 64, 128)))
    finding = only(folder.check())
    assert (finding.severity, finding.kind) == (ERROR, "color mask")
    assert finding.path == str(folder.mask("bad"))


def test_a_mask_of_one_row(folder):
    folder.add("bad", mask=Image.new("L", (16, 1)))
    assert (only(folder.check()).severity, only(folder.check()).kind) == (ERROR, "thin mask")


def test_unreadable_files(folder):
    folder.add("cut", [0, 1, 2])
    content = folder.mask("cut").read_bytes()
    folder.mask("cut").write_bytes(content[: len(content) // 2])
    folder.add("text", [0])
    folder.image("text").write_text("not an image")
    kinds = {(finding.kind, finding.path) for finding in folder.check()}
    assert kinds == {
        ("unreadable mask", str(folder.mask("cut"))),
        ("unreadable image", str(folder.image("text"))),
    }


def test_a_long_list_is_cut_per_kind(folder):
    for index in range(9):
        folder.add(f"bad{index}", [0, 1, 9])
    text = format_findings(folder.check(), per_kind=5)
    assert text.count("label out of range") == 1
    assert "... and 4 more of: label out of range" in text
    assert len(text.splitlines()) == 6


def test_dataset_stops_before_training_and_names_the_file(folder):
    assert len(folder.dataset()) == 3
    folder.add("bad", [0, 1, 7])
    with pytest.raises(ValueError, match=r"bad\.png: has 7"):
        folder.dataset()


def test_dataset_goes_on_with_warnings(folder):
    folder.add("empty", [255])
    dataset = folder.dataset()
    assert len(dataset) == 4
    assert only(dataset.findings()).kind == "nothing labeled"


def test_dataset_reads_no_more_than_its_share(folder, monkeypatch):
    monkeypatch.setattr(SegmentationDataset, "CHECKED_FILES", 3)
    folder.add("later", [0, 7])
    dataset = folder.dataset()
    assert only(dataset.findings()).kind == "label out of range"
    assert dataset.findings(limit=3) == []


def test_lazy_dataset_gives_findings_without_raising(folder):
    folder.mask("good0").unlink()
    assert only(folder.dataset(lazy_init=True).findings()).kind == "missing mask"


def test_reduced_labels_are_what_mmseg_loads(folder):
    folder.add("all", [0, 1, 2, 3])
    dataset = folder.dataset(reduce_zero_label=True)
    loaded = {item["img_path"]: item["gt_seg_map"] for item in dataset}
    assert sorted(np.unique(loaded[str(folder.image("all"))])) == [0, 1, 2, 255]


def test_ade20k_labels(folder):
    folder.add("last", [0, 150])
    dataset = folder.dataset(ADE20KDataset)
    assert len(dataset.metainfo["classes"]) == 150
    assert sorted(np.unique(dataset[3]["gt_seg_map"])) == [149, 255]
    folder.add("over", [151])
    with pytest.raises(ValueError, match=r"over\.png: has 151 .*labels go from 1 to 150"):
        folder.dataset(ADE20KDataset)


def test_subset_of_known_classes(folder):
    """The masks keep the labels of all 150 classes, whichever the config picks."""
    folder.add("last", [0, 150])
    dataset = folder.dataset(ADE20KDataset, metainfo=dict(classes=("wall", "flag")))
    assert sorted(np.unique(dataset[3]["gt_seg_map"])) == [1, 255]


def test_list_of_names_may_leave_out_files(folder):
    (folder.root / "split.txt").write_text("good0\ngood2\n")
    dataset = folder.dataset(ann_file="split.txt")
    assert len(dataset) == 2 and dataset.findings() == []


def test_test_set_without_masks(folder):
    dataset = folder.dataset(data_prefix=dict(img_path="images"), pipeline=[])
    assert len(dataset) == 3 and dataset.findings() == []


def test_missing_folder(folder):
    with pytest.raises(FileNotFoundError, match=r"wrong does not exist; set data_root"):
        folder.dataset(data_prefix=dict(img_path="images", seg_map_path="wrong"))


def test_wrong_suffix(folder):
    with pytest.raises(FileNotFoundError, match=r"ends in '\.bmp'; the files there .*'\.jpg'"):
        folder.dataset(img_suffix=".bmp")


@pytest.mark.parametrize(
    ("metainfo", "message"),
    [
        (dict(classes=()), "no class names"),
        (dict(classes="road"), r"needs a comma: classes = \('road',\)"),
        (dict(classes=CLASSES, palette=[[0, 0, 0]]), "1 colors for 3 classes"),
    ],
)
def test_malformed_metainfo(folder, metainfo, message):
    with pytest.raises(ValueError, match=message):
        folder.dataset(metainfo=metainfo)


def indexed(values, palette):
    """An indexed mask with colors of its values."""
    mask = Image.fromarray(np.resize(np.array(values, np.uint8), SIZE))
    mask.putpalette([number for color in palette for number in color])
    return mask


def test_masks_whose_colors_were_quantized_file_by_file(folder):
    red, green, blue = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    folder.add("paint1", mask=indexed([0, 1], [red, green]))
    folder.add("paint2", mask=indexed([0, 1], [green, blue]))
    (finding,) = (found for found in folder.check() if found.kind == "different palettes")
    assert finding.severity == ERROR and finding.path == str(folder.mask("paint2"))
    assert "the value 0 for the color (0, 250, 0)" in finding.message
    assert f"in {folder.mask('paint1')} this color has 1" in finding.message


def test_indexed_masks_of_one_palette_are_sound(folder):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    folder.add("one", mask=indexed([0, 1], colors))
    folder.add("two", mask=indexed([1, 2], colors[:3]))
    # Values without a color of their own, and colors that no pixel has.
    folder.add("three", mask=indexed([1, 2], [colors[1], *colors[1:]]))
    folder.add("black", mask=indexed([0, 1, 2], [(0, 0, 0)] * 3))
    assert "different palettes" not in [found.kind for found in folder.check()]
