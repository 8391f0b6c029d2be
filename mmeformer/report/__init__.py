# SPDX-License-Identifier: Apache-2.0
"""Report of a training: one HTML file that opens without a network.

:func:`mmeformer.report.build.write` makes it from a work directory. How predictions are compared
with labels is the task's: see :mod:`mmeformer.report.review`.
"""
