# SPDX-License-Identifier: Apache-2.0
"""Published checkpoint formats: pure functions on state dicts, one file per foreign format."""
