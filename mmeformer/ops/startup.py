# SPDX-License-Identifier: Apache-2.0
"""Imports mmeformer when mmcv is first imported, so that mmcv finds its operators.

``setup.py`` puts this file's text into ``mmeformer.pth``, which Python runs at every start in an
environment with mmeformer; nothing imports this module. So it must be quick, must never fail, and
must not affect processes without mmcv: mmeformer itself is imported only together with mmcv, from
the path of that moment.
"""

import sys


class _BeforeMMCV:
    """Finds no module; imports mmeformer when mmcv is asked for."""

    done = False

    def find_spec(self, name, path=None, target=None):
        if name == "mmcv" and not self.done:
            self.done = True
            try:
                import mmeformer  # noqa: F401  (registers the finder)
            except ImportError as error:
                # Uninstalled by hand, or its checkout is gone: nothing is wrong with mmcv then.
                if error.name != "mmeformer":
                    print(f"mmeformer is damaged, reinstall it: {error}", file=sys.stderr)
        return None


sys.meta_path.insert(0, _BeforeMMCV())
