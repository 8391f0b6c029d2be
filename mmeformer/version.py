# SPDX-License-Identifier: Apache-2.0
"""The version, which is written only here; ``setup.py`` reads it as text."""

__version__ = "0.2.0"
