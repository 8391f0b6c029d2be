# SPDX-License-Identifier: Apache-2.0
"""What the test of the doctor runs in a child process.

In a file of its own, as pytest names test files ``tests.test_...``, and model-index, which
mmpretrain needs, installs a package ``tests`` that a child process would import instead.
"""

import os
import signal

from mmeformer.doctor import Probe


def trial(name):
    """Stands in for an import in the child process; must be importable there."""
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        os._exit(3)
    return Probe({"version": name})
