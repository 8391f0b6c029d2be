# SPDX-License-Identifier: Apache-2.0
"""Published checkpoint formats: reading, recognising, loading and converting them.

``safe_load`` reads files without running them. ``reference``, ``timm`` and ``huggingface`` each
spell out one foreign format as pure functions, ``formats`` lists them and tells them apart, and
``translate`` carries state dicts between any of them and ours. ``contents`` takes a file apart,
``load`` fills a backbone, ``convert`` writes files, and ``report`` accounts for every tensor.
"""
