# SPDX-License-Identifier: Apache-2.0
"""Published checkpoint formats: read, recognize, load and convert them.

``safe_load`` reads files without running code in them. ``parse`` finds the backbone in the content.
``reference``, ``timm``, ``mmpretrain`` and ``huggingface`` each describe one format as pure
functions, ``formats`` lists and recognizes them, and ``translate`` converts state dicts between any
of them and ours. ``load`` loads into a backbone, ``convert`` writes files, ``matching`` compares a
file with a whole model, and ``report`` accounts for every tensor.
"""
