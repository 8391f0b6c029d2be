# SPDX-License-Identifier: Apache-2.0
import resource
import subprocess
import sys

import pytest

from mmeformer.memory import keep_freed_memory

# Page faults of ten tensors of 64 MB, made and freed one after the other.
SCRIPT = """
import resource, sys, torch
from mmeformer.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
def test_large_tensors_get_the_same_memory_again():
    faults = {}
    for choice in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, choice], capture_output=True, text=True, check=True
        )
        faults[choice] = int(done.stdout)
    assert faults["default"] >= 10 * 2**26 // resource.getpagesize()
    assert faults["keep"] < faults["default"] / 4
