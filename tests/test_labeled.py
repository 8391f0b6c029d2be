# SPDX-License-Identifier: Apache-2.0
"""Labeled objects: boxes, outlines and masks that follow from each other."""

import numpy as np
import pytest
import shapely

from mmeformer.labeled import (
    LabeledObject,
    decode_rle,
    encode_rle,
    fill_polygons,
    mask_box,
)


@pytest.mark.parametrize("seed", range(5))
def test_pixels_inside_a_polygon(seed):
    """Compared with shapely, center by center."""
    generator = np.random.default_rng(seed)
    angles = np.sort(generator.uniform(0, 2 * np.pi, 9))
    radii = generator.uniform(3, 14, 9)
    polygon = np.stack([12 + radii * np.cos(angles), 9 + radii * np.sin(angles)], -1)
    found = fill_polygons([polygon.ravel()], 20, 22)
    y, x = np.mgrid[:20, :22] + 0.5
    expected = shapely.contains_xy(shapely.Polygon(polygon), x, y)
    np.testing.assert_array_equal(found, expected)


def test_whole_pixels():
    """A square from 4 to 8 has four pixels each way; parts of an object are united."""
    square = [4, 4, 8, 4, 8, 8, 4, 8]
    other = [6, 6, 30, 6, 30, 9, 6, 9]
    found = fill_polygons([square, other], 12, 16)
    expected = np.zeros((12, 16), np.uint8)
    expected[4:8, 4:8] = expected[6:9, 6:] = 1
    np.testing.assert_array_equal(found, expected)
    assert mask_box(found) == (4, 4, 12, 5)
    np.testing.assert_array_equal(decode_rle(encode_rle(found)), expected)


def test_shapes_that_follow():
    item = LabeledObject.outlined(0, [[2, 1, 6, 1, 6, 3, 2, 3], [8, 1, 9, 1, 9, 3]])
    assert item.box == (2, 1, 7, 2) and len(item.outlines()) == 2
    corners = item.quadrilateral()
    assert {tuple(map(round, corner)) for corner in corners} == {(2, 1), (9, 1), (9, 3), (2, 3)}
    turned = LabeledObject.cornered(0, [0, 1, 1, 0, 3, 2, 2, 3])
    assert turned.box == (0, 0, 3, 3) and turned.outlines() == [[0, 1, 1, 0, 3, 2, 2, 3]]
    flat = LabeledObject(0, (1, 2, 3, 4))
    assert flat.outlines() == [[1, 2, 4, 2, 4, 6, 1, 6]]
    assert flat.quadrilateral().tolist() == [[1, 2], [4, 2], [4, 6], [1, 6]]
