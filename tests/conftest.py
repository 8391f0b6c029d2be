# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test modules share."""

import logging
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from mmeformer.variants import VARIANTS, Variant

# pytest attaches itself to every logger that does not propagate. On this one PyTorch takes that
# for the wish to see all that it compiles, which then takes ten times as long.
logging.getLogger("torch.__trace").propagate = True


# Drawn inputs depend on nothing but the test: a commit that passes once passes again. New ones
# are drawn by `make test-all`. A busy machine may take its time; hangs end by pytest-timeout.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("repeatable")


def pytest_sessionstart(session):
    """Say in one line that the disk is nearly full, where else every later test would fail."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    if free < 3:
        pytest.exit(
            f"only {free:.1f} GB are free in {folder}, and the tests write up to 3 GB there: "
            "free some, or choose another folder with TMPDIR",
            returncode=4,
        )


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request) -> Variant:
    """Every published variant in turn: all tests of a module with the first, then the second.

    So that what one test computed for a variant is still there for the next.
    """
    return VARIANTS[request.param]


SMALL = ("efficientformer_l1", "efficientformerv2_s0")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow) for name in VARIANTS
    ],
)
def any_variant(request) -> Variant:
    """Every published variant, of which only the smallest of each family is no slow test.

    For what the size does not decide. What ties a variant to its published weights and figures is
    tested with :func:`variant`.
    """
    return VARIANTS[request.param]


@pytest.fixture(params=SMALL)
def small_variant(request) -> Variant:
    """The smallest variant of each family."""
    return VARIANTS[request.param]


@pytest.fixture(autouse=True)
def name_of_the_program(monkeypatch):
    """The command ``mmeformer`` names its sub-command there, for help and errors."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def unformatted_configs():
    """mmengine formats a config with yapf each time it is logged or saved.

    That takes two thirds of a training of a few steps, and no test is about it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **kwargs: (text, True))
        yield


@pytest.fixture(scope="session", autouse=True)
def uncollected_data_sets():
    """mmengine collects the garbage of the whole process for each data set that it builds.

    That is a quarter of a training of a few steps, whose data sets have some ten images.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.dataset.base_dataset.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """The data of ``tiny.TASKS`` in one folder, to be read only."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny_data")
    for make in tiny.TASKS.values():
        make(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_data, tmp_path):
    """A copy of ``tiny_data`` for the test alone."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def quiet_logging(monkeypatch):
    """mmengine's loggers keep the output of the test that made them, which is closed by now."""
    monkeypatch.setattr("logging.raiseExceptions", False)


def pytest_collection_modifyitems(items):
    """Tests that copy their process come first, while it has no threads of torch.compile or CUDA.

    PyTorch's autograd refuses to work in a copy of a process that has them. The environments of
    wheels are next: they take longest, and several processes share the rest better. (xdist gives
    the first tests to one process, and what another process takes over are never these.)
    """
    items.sort(
        key=lambda item: ("forks" not in item.keywords, "environments" not in item.fixturenames)
    )
    if torch.cuda.is_available():
        for item in items:
            if "forks" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="CUDA fails in copies of a process"))
