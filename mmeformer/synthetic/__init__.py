# SPDX-License-Identifier: Apache-2.0
"""Generated data sets for the quickstarts and tests: deterministic, no downloads."""
