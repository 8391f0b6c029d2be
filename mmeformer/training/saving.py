# SPDX-License-Identifier: Apache-2.0
"""Save training checkpoints safely, and find the one to resume from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmeformer.checkpoints import safe_load
from mmeformer.errors import CheckpointError
from mmeformer.files import is_draft, write_text

POINTER = "last_checkpoint"
"""File of mmengine in the work directory that names the latest checkpoint."""
RESUMABLE = ("meta", "state_dict", "optimizer", "message_hub")
"""Entries that a checkpoint needs to resume from it."""


def read_resumable(path: str | Path) -> dict:
    """Read a training checkpoint from a file or URL.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: it is damaged, or has only the weights of a model.
    """
    content = safe_load.load(path)
    if missing := [key for key in RESUMABLE if key not in content]:
        raise CheckpointError(
            f"{path} has no {', '.join(missing)}: it has a model, not the state of a training. "
            "Resume from an epoch_*.pth or iter_*.pth, or start from its weights with "
            "--cfg-options load_from=..."
        )
    return content


def newest_resumable(work_dir: str | Path) -> tuple[Path, dict] | None:
    """Find the checkpoint to resume from.

    It is the one that ``last_checkpoint`` names, if complete, else the newest complete one. Damaged
    files are logged as warnings.

    Returns:
        The file and its content on the CPU, or None if the work directory has no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    damaged = []
    for path in _candidates(Path(work_dir)):
        try:
            content = read_resumable(path)
        except (CheckpointError, FileNotFoundError) as error:
            damaged.append(str(error))
            print_log(f"not resumed from: {error}", "current", logging.WARNING)
        else:
            return path, content
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {work_dir} can be resumed from; the first "
            f"of them: {damaged[0]}. To start from the beginning, train without --resume"
        )
    return None


def _candidates(work_dir: Path) -> Iterator[Path]:
    """Files to resume from, in the order to try them."""
    folders = [work_dir]
    named: list[Path] = []
    pointer = work_dir / POINTER
    if pointer.is_file() and (text := pointer.read_text().strip()):
        # The folder may have been moved or copied: prefer files in it to those at the old path.
        named = [work_dir / Path(text).name]
        if not named[0].is_file():
            named = [Path(text)]
            folders = [named[0].parent, work_dir] if named[0].name != text else folders
    found = [path for folder in dict.fromkeys(folders) for path in folder.glob("*.pth")]
    # The best model is saved without optimizer; drafts may be incomplete.
    found = [path for path in found if not path.name.startswith("best_") and not is_draft(path)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    yield from dict.fromkeys(path for path in [*named, *found] if path.is_file())


class CheckpointHook(MMEngineCheckpointHook):
    """mmengine's hook that removes an old checkpoint only after the new one is on the disk.

    If ``save_best`` names a metric that is not evaluated, the closest one takes its place.

    mmengine removes it first, so a kill or a full disk at that moment leaves no checkpoint.
    Arguments are those of mmengine. :class:`mmeformer.training.runner.Runner` uses it in place of
    mmengine's.
    """

    best_ckpt_path: str | None

    def before_train(self, runner: Runner) -> None:
        """Remove the files that a killed run left unfinished."""
        super().before_train(runner)
        if is_main_process():
            for folder in {Path(self.out_dir), Path(runner.work_dir)}:
                for path in folder.glob(".*"):
                    if is_draft(path) and path.is_file():
                        path.unlink()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [known for known in self.keep_ckpt_ids if known != step] + [step]
            outdated, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)
            runner.message_hub.update_info("keep_ckpt_ids", kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_text(Path(runner.work_dir, POINTER), self.last_ckpt, sync=True)
            for known in outdated:
                self._remove(
                    self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(known))
                )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        self._require_indicators(runner, metrics)
        self._drop_other_metric(runner)
        # Hide the previous best from mmengine, which would remove it before saving.
        before = self._best()
        self._set_best({})
        super()._save_best_checkpoint(runner, metrics)
        after = self._best()
        self._set_best({**before, **after})
        if is_main_process():
            for name, path in before.items():
                if name in after and after[name] != path:
                    self._remove(path)

    def _require_indicators(self, runner: Runner, metrics: Mapping) -> None:
        """Replace metrics that are not evaluated by the closest ones that are.

        ``save_best`` of a base config does not know which metrics a config evaluates, such as those
        of masks only. mmengine would fail after the first epoch.
        """
        scores = [name for name, value in metrics.items() if isinstance(value, Real)]
        missing = [name for name in self.key_indicators if name not in (*metrics, "auto")]
        if not missing or not scores:
            return
        chosen = [
            closest_metric(name, scores) if name in missing else name
            for name in self.key_indicators
        ]
        self._init_rule(self.rules, chosen)
        runner.logger.warning(
            f"save_best: {', '.join(missing)} is not among the metrics {', '.join(scores)}; the "
            f"best checkpoint is that of {', '.join(chosen)}. To choose another, set "
            "default_hooks.checkpoint.save_best"
        )

    def _drop_other_metric(self, runner: Runner) -> None:
        """After resuming with another ``save_best``, do not compare with the score of the old."""
        if len(self.key_indicators) > 1 or "auto" in self.key_indicators or not self.best_ckpt_path:
            return
        (name,) = self.key_indicators
        if not Path(self.best_ckpt_path).name.startswith(f"best_{name}_".replace("/", "_")):
            self.best_ckpt_path = None
            runner.message_hub.pop_info("best_score", None)
            runner.message_hub.pop_info("best_ckpt", None)

    def _best(self) -> dict[str | None, str]:
        """Paths of the best checkpoints by metric, or under None if there is only one metric."""
        if hasattr(self, "best_ckpt_path_dict"):
            paths = self.best_ckpt_path_dict
        else:
            paths = {None: self.best_ckpt_path}
        return {name: path for name, path in paths.items() if path}

    def _set_best(self, paths: dict[str | None, str]) -> None:
        if hasattr(self, "best_ckpt_path_dict"):
            self.best_ckpt_path_dict = {name: paths.get(name) for name in self.key_indicators}
        else:
            self.best_ckpt_path = paths.get(None)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


def closest_metric(name: str, others: Sequence[str]) -> str:
    """The first of ``others`` with most words of ``name``: for ``coco/bbox_mAP``, say,
    ``coco/segm_mAP``.
    """

    def words(text: str) -> set[str]:
        return set(re.findall(r"[A-Z]?[a-z]+|[A-Z]|\d+", text))

    return max(others, key=lambda other: len(words(name) & words(other)))


def find_nonfinite(state: dict) -> list[str]:
    """Names of the tensors that have NaN or infinite values."""
    return [
        name
        for name, tensor in state.items()
        if torch.is_floating_point(tensor) and not torch.isfinite(tensor).all()
    ]
