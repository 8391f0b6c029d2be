# SPDX-License-Identifier: Apache-2.0
"""Windows cover images, and no more than one batch of them exists at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmeformer.windows import FILL, crop, predict_windows, windows


@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    size=st.integers(1, 50),
    share=st.floats(0, 0.99),
)
def test_windows_cover_the_image_and_share_the_overlap(width, height, size, share):
    overlap = int(size * share)
    places = windows(width, height, size, overlap)
    assert len(set(places)) == len(places)
    covered = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in places:
        assert (x1 - x0, y1 - y0) == (min(size, width), min(size, height))
        assert 0 <= x0 and x1 <= width and 0 <= y0 and y1 <= height
        covered[y0:y1, x0:x1] = True
    assert covered.all()
    for low, high in ((0, 2), (1, 3)):
        spans = sorted({(place[low], place[high]) for place in places})
        for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
            assert end - start >= overlap


@given(x=st.integers(0, 463), y=st.integers(0, 262))
def test_objects_as_large_as_the_overlap_lie_whole_in_a_window(x, y):
    item = (x, y, x + 37, y + 37)
    assert any(
        place[0] <= item[0] and place[1] <= item[1] and item[2] <= place[2] and item[3] <= place[3]
        for place in windows(500, 299, 100, 37)
    )


def test_places_are_those_of_the_patches_of_dota():
    # As mmrotate's img_split.py cuts an image of this size.
    assert windows(1111, 1182, 1024, 512) == [
        (0, 0, 1024, 1024),
        (87, 0, 1111, 1024),
        (0, 158, 1024, 1182),
        (87, 158, 1111, 1182),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, 0, 0), "windows of 0"),
        ((0, 10, 5, 0), "0 x 10 pixels"),
        ((10, 10, 5, 5), "overlap 5 must be"),
        ((10, 10, 5, -1), "overlap -1 must be"),
    ],
)
def test_impossible_windows_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(*arguments)


def test_crop_pads_small_windows():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    view = crop(image, (2, 1, 5, 4))
    assert np.shares_memory(view, image)
    np.testing.assert_array_equal(view, image[1:4, 2:5])
    padded = crop(image, (0, 0, 6, 4), 8)
    np.testing.assert_array_equal(padded[:4, :6], image)
    assert (padded[4:] == FILL).all() and (padded[:, 6:] == FILL).all()
    assert padded.shape == (8, 8, 3)


def test_batches_are_as_large_as_said_and_results_keep_their_places():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    places = windows(70, 50, 20, 5)
    sizes = []

    def predict(crops):
        sizes.append(len(crops))
        return [int(part.astype(int).sum()) for part in crops]

    steps = []
    found = list(
        predict_windows(image, places, predict, 4, progress=lambda *step: steps.append(step))
    )
    assert steps == [(index, len(places)) for index in range(1, len(places) + 1)]
    assert sizes == [4] * (len(places) // 4) + ([len(places) % 4] if len(places) % 4 else [])
    for (x0, y0, x1, y1), total in zip(places, found, strict=True):
        assert total == image[y0:y1, x0:x1].astype(int).sum()


def test_wrong_batches_and_results_are_errors():
    image = np.zeros((5, 5, 3), np.uint8)
    with pytest.raises(ValueError, match="batch size 0"):
        list(predict_windows(image, [(0, 0, 5, 5)], lambda crops: [1], 0))
    with pytest.raises(ValueError, match="zip"):
        list(predict_windows(image, [(0, 0, 5, 5)], lambda crops: [], 1))
