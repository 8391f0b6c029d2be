# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp("module")
