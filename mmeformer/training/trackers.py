# SPDX-License-Identifier: Apache-2.0
"""Programs that record trainings, as backends of mmengine's visualizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from mmengine.config import Config, ConfigDict

from mmeformer.errors import UserError
from mmeformer.settings import type_name

TRACKERS = {
    "tensorboard": "TensorboardVisBackend",
    "wandb": "WandbVisBackend",
    "mlflow": "MLflowVisBackend",
    "clearml": "ClearMLVisBackend",
}
"""Backends of mmengine by the name of the package they need."""
MLFLOW_STORE = "sqlite:///mlflow.db"
"""Where MLflow records if ``MLFLOW_TRACKING_URI`` names nothing else: its own default since 3.7.

mmengine would name a folder in place of it, which MLflow refuses since then.
"""
DEFAULT = "tensorboard"
"""The tracker that is used if it is installed and none is named."""
NONE = "none"
"""In place of names: no tracker beside those of the config."""


def add_trackers(config: Config, names: Sequence[str] | None = None) -> None:
    """Add trackers to a config's visualizer, in place; those that it has stay as they are.

    Args:
        config: of a training.
        names: keys of :data:`TRACKERS`, or :data:`NONE` alone; None takes :data:`DEFAULT` if it is
            installed.

    Raises:
        UserError: a package is missing, or ``none`` stands beside others.
    """
    if names is None:
        names = [DEFAULT] if find_spec(DEFAULT) else []
    elif NONE in names:
        if len(names) > 1:
            raise UserError(f"--log {' '.join(names)}: {NONE} stands alone")
        names = []
    if missing := [name for name in names if find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)} is not installed: pip install {' '.join(missing)}, or leave it "
            "out of --log"
        )
    if not names:
        return
    visualizer = config.get("visualizer") or ConfigDict(type="Visualizer")
    backends = list(visualizer.get("vis_backends") or [dict(type="LocalVisBackend")])
    known = {type_name(backend) for backend in backends}
    for name in names:
        if TRACKERS[name] not in known:
            backend = dict(type=TRACKERS[name])
            if name == "mlflow":
                backend["tracking_uri"] = os.environ.get("MLFLOW_TRACKING_URI") or MLFLOW_STORE
            backends.append(backend)
    visualizer.vis_backends = backends
    config.visualizer = visualizer
