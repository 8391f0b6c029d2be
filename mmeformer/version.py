# SPDX-License-Identifier: Apache-2.0
"""The one place where the version is written; ``setup.py`` reads it as text."""

__version__ = "0.2.0"
