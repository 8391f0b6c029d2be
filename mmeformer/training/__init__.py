# SPDX-License-Identifier: Apache-2.0
"""Training and testing that survive interruptions, damaged files and a full disk.

:class:`mmeformer.training.runner.Runner` uses everything here; ``docs/robustness.md`` explains it.
"""
