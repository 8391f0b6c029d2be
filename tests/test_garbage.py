# SPDX-License-Identifier: Apache-2.0
"""Reading labels without the garbage collector."""

import gc

import pytest

from mmeformer.garbage import without_collection


@without_collection()
def _read(fails: bool) -> bool:
    if fails:
        raise ValueError("bad labels")
    return gc.isenabled()


def test_the_collector_rests_and_goes_on():
    assert gc.isenabled()
    assert not _read(fails=False)
    with pytest.raises(ValueError):
        _read(fails=True)
    assert gc.isenabled()
