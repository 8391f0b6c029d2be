# SPDX-License-Identifier: Apache-2.0
"""A probe for the tests of the doctor, in a file that its child processes find by name.

They cannot import test files: some libraries install a package ``tests``, which comes first.
"""

import os
import signal

from mmeformer.doctor import Probe


def trial(name):
    """Stands in for an import in the child process."""
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        os._exit(3)
    return Probe({"version": name})
