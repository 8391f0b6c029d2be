#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Parameters, multiply-adds, memory and latency of a model, in one table."""

import sys

if __name__ == "profile":
    # Python looks in a command's own folder first. So `import profile` in any command here means
    # this file, and PyTorch asks for it by way of cProfile: hand out the standard library's.
    import importlib.util
    import sysconfig

    _spec = importlib.util.spec_from_file_location(
        "profile", f"{sysconfig.get_path('stdlib')}/profile.py"
    )
    sys.modules["profile"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["profile"])
else:
    from mmeformer.commands.profile import main

    if __name__ == "__main__":
        sys.exit(main())
