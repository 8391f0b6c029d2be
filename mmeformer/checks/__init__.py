# SPDX-License-Identifier: Apache-2.0
"""Checks that find errors in a data set before a model is trained on it."""
