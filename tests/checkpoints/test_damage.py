# SPDX-License-Identifier: Apache-2.0
"""Random damage to checkpoint files: an error, or the very content; never other weights."""

import io
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeformer.checkpoints import safe_load
from mmeformer.errors import CheckpointError
from mmeformer.training.state import newest_resumable

CONTENT = dict(
    meta=dict(iter=3, seed=7, name="run"),
    state_dict={f"layer{index}.weight": torch.arange(40.0) + index for index in range(4)},
    optimizer=dict(state={0: dict(step=torch.tensor(3.0))}, param_groups=[dict(lr=0.1)]),
    message_hub={},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "iter_3.pth"
    torch.save(CONTENT, path)
    return path.read_bytes()


def same(first, second) -> bool:
    """Whether nested dicts and lists hold the same values, bit by bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_files(whole, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    damaged = bytearray(whole)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "swap"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del damaged[place:]
    elif kind == "insert":
        damaged[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "overwrite":
        new = data.draw(st.binary(min_size=1, max_size=200))
        damaged[place : place + len(new)] = new
    else:
        half = len(damaged) // 2
        damaged = damaged[half:] + damaged[:half]
    path.write_bytes(damaged)
    try:
        content = safe_load.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert same(content, CONTENT)


def test_a_member_marked_as_a_folder(whole, tmp_path):
    """torch would return a tensor of uninitialized memory."""
    path = tmp_path / "damaged.pth"
    damaged = bytearray(whole)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        (member,) = (item for item in archive.infolist() if item.filename.endswith("data/0"))
    # A member's name occurs last in the archive's directory, after the member's attributes.
    damaged[whole.rindex(member.filename.encode()) - 8] |= 0x10
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="data/0 is marked as a folder"):
        safe_load.read(path)


@settings(max_examples=50)
@given(cut=st.floats(0, 0.999))
def test_a_killed_write_is_never_resumed_from(whole, tmp_path_factory, cut):
    """Wherever a write without our rename would have been cut off."""
    folder = tmp_path_factory.getbasetemp() / "resume"
    folder.mkdir(exist_ok=True)
    (folder / "iter_2.pth").write_bytes(whole)
    (folder / "iter_3.pth").write_bytes(whole[: int(cut * len(whole))])
    (folder / "last_checkpoint").write_text(str(folder / "iter_3.pth"))
    path, content = newest_resumable(folder)
    assert path.name == "iter_2.pth" and same(content, CONTENT)
