# SPDX-License-Identifier: Apache-2.0
"""What data workers send arrives as it was."""

import tiny
import torch
from mmengine.config import Config
from torch.utils.data import DataLoader, Dataset

from mmeformer.training import engine
from mmeformer.training.transport import SMALL, send_small_tensors_whole

SENT = [
    torch.arange(SMALL // 4, dtype=torch.int32),
    torch.arange(SMALL // 4 + 1, dtype=torch.int32),
    torch.rand(5, 7, dtype=torch.float64).T,
    torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)[1:],
    torch.zeros(0, 4),
    torch.tensor(3),
    torch.tensor([True, False]),
    torch.rand(3).to(torch.bfloat16),
    torch.rand(3).requires_grad_(),
    torch.rand(3, 3).to_sparse(),
    torch.rand(3).expand(2, 3),
]
SHARED = {1, 7, 8}


class Samples(Dataset):
    def __len__(self):
        return len(SENT)

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return SENT[index]


def loaded(worker_init_fn=None):
    return list(DataLoader(Samples(), None, num_workers=1, worker_init_fn=worker_init_fn))


def test_tensors_arrive_as_they_were():
    for index, (sent, found) in enumerate(
        zip(SENT, loaded(send_small_tensors_whole(None)), strict=True)
    ):
        assert torch.equal(found.to_dense(), sent.to_dense())
        assert (found.dtype, found.layout) == (sent.dtype, sent.layout)
        assert found.requires_grad == sent.requires_grad
        if found.layout == torch.strided:
            assert found.is_shared() == (index in SHARED), index
        if not found.requires_grad:
            found.zero_()  # it can be written


def test_the_function_before_is_called(tmp_path):
    def note(worker):
        (tmp_path / str(worker)).touch()

    loaded(send_small_tensors_whole(note))
    assert (tmp_path / "0").exists()


def test_tensors_of_this_process_stay_shared():
    """A program may rely on it."""
    for found in loaded():
        assert found.layout != torch.strided or found.numel() == 0 or found.is_shared()


def test_trainings_send_boxes_and_labels_whole(tmp_path):
    config: Config = tiny.detection(tmp_path)
    config.work_dir = str(tmp_path / "run")
    config.train_dataloader.update(num_workers=1, batch_size=2)
    runner = engine.build_train_runner(config)
    batch = next(iter(runner.build_dataloader(config.train_dataloader)))
    for sample in batch["data_samples"]:
        objects = sample.gt_instances
        assert not objects.bboxes.tensor.is_shared() and not objects.labels.is_shared()
