# SPDX-License-Identifier: Apache-2.0
"""What keeps a long run alive and honest: exact restarts, safe checkpoints, unreadable files.

:class:`mmeformer.training.runner.Runner` puts it all to work; ``docs/robustness.md`` explains it.
"""
