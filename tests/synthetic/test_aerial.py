# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
from shapely.geometry import Polygon

from mmeformer.synthetic.aerial import ASPECTS, CLASSES, draw_scene, write_dota_dataset


def scenes(count, size=128):
    return [draw_scene(np.random.default_rng(index), size) for index in range(count)]


def test_boxes_have_their_classes_proportions_and_lie_inside():
    seen = set()
    for _, objects in scenes(30):
        for item in objects:
            length = np.linalg.norm(item.corners[0] - item.corners[3])
            width = np.linalg.norm(item.corners[1] - item.corners[0])
            assert length / width == pytest.approx(ASPECTS[item.label])
            assert 0 <= item.corners.min() and item.corners.max() <= 127
            seen.add(item.label)
    assert seen == set(range(len(CLASSES)))


def test_objects_do_not_overlap_yet_stand_close():
    gaps = []
    for _, objects in scenes(30):
        polygons = [Polygon(item.corners) for item in objects]
        for index, one in enumerate(polygons):
            for other in polygons[index + 1 :]:
                assert one.intersection(other).area < 0.1 * min(one.area, other.area)
                gaps.append(one.distance(other))
    assert min(gaps) < 4, "some stand in rows"


def test_objects_are_where_their_boxes_say():
    """The same scene without its objects differs inside the boxes and nowhere else."""
    image, objects = draw_scene(np.random.default_rng(3), 128)
    boxes = np.zeros((128, 128), np.uint8)
    for item in objects:
        cv2.fillPoly(boxes, [np.round(item.corners).astype(np.int32)], 1)
    near = cv2.dilate(boxes, np.ones((5, 5), np.uint8)).astype(bool)
    smooth = cv2.GaussianBlur(image, (5, 5), 0).astype(float)
    edges = np.abs(np.diff(smooth, axis=1)).max(axis=2)
    inside = near[:, 1:] | near[:, :-1]
    assert edges[inside].max() > 30
    assert np.percentile(edges[~inside], 99.9) < 15


def test_empty_images_occur():
    assert any(not objects for _, objects in scenes(80, 64))


def test_dataset_is_deterministic_and_in_dotas_format(tmp_path):
    one = write_dota_dataset(tmp_path / "a", 3, 2, 64, seed=1)
    two = write_dota_dataset(tmp_path / "b", 3, 2, 64, seed=1)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 11
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    for path in one.rglob("*.txt"):
        for line in path.read_text().splitlines():
            *corners, name, difficult = line.split()
            assert len([float(value) for value in corners]) == 8
            assert name in CLASSES and difficult == "0"
    with pytest.raises(FileExistsError):
        write_dota_dataset(tmp_path / "a", 4, 2, 64, seed=1)
