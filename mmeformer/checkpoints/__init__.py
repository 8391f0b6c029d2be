# SPDX-License-Identifier: Apache-2.0
"""Published checkpoint formats: read, recognize, load and convert them.

``safe_load`` reads files without running them. ``parse`` finds the backbone in what was read.
``reference``, ``timm`` and ``huggingface`` each describe one format as pure functions, ``formats``
lists them and tells them apart, and ``translate`` carries state dicts between any of them and ours.
``load`` fills a backbone, ``convert`` writes files, ``matching`` compares a file with a whole
model, and ``report`` accounts for every tensor.
"""
