# SPDX-License-Identifier: Apache-2.0
"""Command lines: one module per command, each with ``main(argv) -> exit status``.

The files in ``tools/`` call these modules.
"""
