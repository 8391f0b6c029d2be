# SPDX-License-Identifier: Apache-2.0
import os
import resource
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from mmeformer.training import device
from mmeformer.training.memory import keep_freed_memory

# Page faults of ten tensors of 64 MB, made and freed in turn: before the call and after.
SCRIPT = """
import resource, torch
from mmeformer.training.memory import keep_freed_memory

def faults():
    for _ in range(10):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
assert keep_freed_memory()
print(default, faults())
"""


def run(script):
    """Numbers that a script prints, without settings of the C library in the environment."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={key: value for key, value in os.environ.items() if "MALLOC" not in key},
    )
    return map(float, done.stdout.split())


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
def test_large_tensors_get_the_same_memory_again():
    default, kept = run(SCRIPT)
    assert default >= 10 * 2**26 // resource.getpagesize()
    assert kept < default / 4


# MiB that stay resident when tensors of 16 MiB go and small ones between them stay: first in a copy
# of the process that makes the call, then in one that does not.
FREED = """
import os, resource, torch
from mmeformer.training.memory import return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

if child := os.fork():
    os.waitpid(child, 0)
else:
    assert return_freed_memory()
torch.ones(6 * 2**20)  # 24 MiB: the C library now takes up to that from its heap
before = resident()
large, small = [], []
for _ in range(20):
    large.append(torch.ones(2**22))
    small.append(torch.ones(2**10))
del large
print(resident() - before, flush=True)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
def test_large_tensors_leave_nothing_behind():
    returned, default = run(FREED)
    assert returned < 16 < default


def test_checkpointed_training_returns_memory(monkeypatch):
    called = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: called.append("keep"))
    monkeypatch.setattr(device, "return_freed_memory", lambda: called.append("return"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backbone in (dict(with_cp=True), dict(with_cp=False), dict()):
        device.prepare_device(Config(dict(model=dict(backbone=backbone))), "none")
    assert called == ["return", "keep", "keep"]
