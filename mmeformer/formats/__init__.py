# SPDX-License-Identifier: Apache-2.0
"""Readers of labeled data sets, one file per format; each returns a ``LabeledData``.

A reader is a module with ``NAME``, ``find(tree)``, the files by which it recognizes its format, and
``read(tree, options)``. :func:`mmeformer.formats.find.read_folder` chooses among them.
"""
