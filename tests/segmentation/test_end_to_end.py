# SPDX-License-Identifier: Apache-2.0
"""From generated data over training to evaluation and mmseg's inference APIs."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmseg.apis import MMSegInferencer, inference_model, init_model

from mmeformer import configs
from mmeformer.paths import config_dir, tools_dir
from mmeformer.segmentation.hooks import SegNumClassCheckHook
from mmeformer.synthetic.masks import CLASSES, write_mask_dataset
from mmeformer.training import engine

QUICKSTART = "segmentation/semantic-fpn_efficientformerv2-s0_quickstart.py"
PALETTE = [[60, 60, 60], [220, 60, 60], [60, 160, 60], [70, 90, 220], [230, 190, 50]]


def small_config(root: Path) -> Config:
    """The quickstart's config, with two iterations on the data in ``root``."""
    config = configs.load_config(QUICKSTART)
    for name in ("train", "val", "test"):
        loader = config[f"{name}_dataloader"]
        loader.dataset.data_root = str(root)
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    config.train_cfg.update(max_iters=2, val_interval=2)
    config.default_hooks.checkpoint.interval = 2
    config.work_dir = str(root.parent / "work")
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config file, checkpoint, data folder) of two iterations."""
    folder = tmp_path_factory.mktemp("segmentation")
    root = write_mask_dataset(folder / "data", train=4, val=3, size=64)
    config = small_config(root)
    file = folder / "config.py"
    config.dump(file)
    runner = engine.build_train_runner(config)
    assert not [m for m in runner.model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    runner.train()
    return file, Path(config.work_dir, "iter_2.pth"), root


def test_checkpoint_names_its_classes(trained):
    _, checkpoint, _ = trained
    meta = torch.load(checkpoint, map_location="cpu", weights_only=False)["meta"]["dataset_meta"]
    assert tuple(meta["classes"]) == CLASSES
    assert meta["palette"] == PALETTE


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("tta", [False, True])
def test_evaluation(trained, tmp_path, mode, tta):
    file, checkpoint, _ = trained
    options = {"model.test_cfg.mode": mode, "model.test_cfg.crop_size": (40, 40)}
    config = configs.load_config(file, {**options, "model.test_cfg.stride": (27, 27)})
    config.test_dataloader.batch_size = 1
    config.work_dir = str(tmp_path)
    if tta:
        # Two scales, one with odd sides, in place of six large ones.
        config.tta_pipeline[1].transforms[0] = [
            dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (40, 53)
        ]
    runner = engine.build_test_runner(
        config,
        str(checkpoint),
        out=str(tmp_path / "out.pkl"),
        show_dir=str(tmp_path / "pictures"),
        tta=tta,
    )
    metrics = runner.test()
    assert 0 <= metrics["mIoU"] <= 100
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert len(pictures) == 3
    # Ground truth on the left, prediction on the right.
    assert cv2.imread(str(pictures[0])).shape == (64, 128, 3)
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert [item["pred_sem_seg"]["data"].shape for item in predictions] == [(1, 64, 64)] * 3


def test_augmented_probabilities_are_the_mean_of_the_views(trained):
    """Scores of the merged prediction against each view computed alone."""
    file, checkpoint, root = trained
    config = configs.load_config(file)
    model = init_model(config, str(checkpoint), device="cpu")
    picture = cv2.imread(str(root / "images/validation/000000.png"))
    views = []
    for flip in (False, True):
        image = np.ascontiguousarray(picture[:, ::-1] if flip else picture)
        logits = inference_model(model, image).seg_logits.data
        views.append((logits.flip(-1) if flip else logits).softmax(dim=0))

    config = configs.load_config(file)
    config.tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=(64, 64), keep_ratio=True)]
    config.work_dir = str(root.parent / "tta")
    runner = engine.build_test_runner(config, str(checkpoint), tta=True)
    batch = next(iter(runner.test_dataloader))
    runner.load_or_resume()
    runner.model.eval()
    with torch.no_grad():
        merged = runner.model.test_step(batch)
    expected = torch.stack(views).mean(dim=0).argmax(dim=0)
    agreement = (merged[0].pred_sem_seg.data[0] == expected).float().mean()
    assert agreement > 0.999


@pytest.mark.parametrize("size", [(64, 64), (51, 83), (97, 33)])
def test_init_model_needs_only_config_and_checkpoint(trained, tmp_path, size):
    file, checkpoint, root = trained
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    model = init_model(str(file), str(checkpoint), device="cpu")
    assert tuple(model.dataset_meta["classes"]) == CLASSES
    assert model.dataset_meta["palette"] == PALETTE
    picture = cv2.resize(cv2.imread(str(root / "images/validation/000000.png")), size[::-1])
    path = tmp_path / "odd.png"
    cv2.imwrite(str(path), picture)
    from_file, from_array = inference_model(model, str(path)), inference_model(model, picture)
    assert from_file.pred_sem_seg.data.shape == (1, *size)
    assert torch.equal(from_file.pred_sem_seg.data, from_array.pred_sem_seg.data)


def test_inferencer_draws_with_the_palette_of_the_checkpoint(trained, tmp_path):
    file, checkpoint, root = trained
    inferencer = MMSegInferencer(str(file), str(checkpoint), device="cpu", show_progress=False)
    picture = str(root / "images/validation/000001.png")
    result = inferencer(
        picture, out_dir=str(tmp_path), opacity=1.0, with_labels=False, return_vis=True
    )
    labels = result["predictions"]
    assert labels.shape == (64, 64)
    saved = cv2.imread(str(tmp_path / "pred/00000000_pred.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(saved, labels)
    assert np.array_equal(result["visualization"], np.array(PALETTE, np.uint8)[labels])
    several = inferencer([picture, picture])
    assert np.array_equal(several["predictions"][0], several["predictions"][1])


@pytest.mark.parametrize("arch", ["efficientformer-l1", "efficientformerv2-s0"])
def test_published_config_serves_a_checkpoint_without_download(arch, tmp_path):
    """Pretrained ImageNet weights are not fetched: there is no network in these tests."""
    file = config_dir() / f"segmentation/semantic-fpn_{arch}_40k_ade20k-512x512.py"
    model = init_model(str(file), device="cpu")
    path = tmp_path / "weights.pth"
    meta = dict(dataset_meta=dict(classes=("a", "b"), palette=[[1, 2, 3], [4, 5, 6]]))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    model = init_model(str(file), str(path), device="cpu")
    assert model.dataset_meta["classes"] == ("a", "b")
    picture = np.random.default_rng(0).integers(0, 256, (70, 131, 3), dtype=np.uint8)
    # Small pictures are enlarged to 512 px by the published test; once is enough here.
    model.cfg.test_pipeline[1].scale = (256, 64)
    assert inference_model(model, picture).pred_sem_seg.data.shape == (1, 70, 131)
    inferencer = MMSegInferencer(str(file), str(path), device="cpu", show_progress=False)
    assert inferencer.model.dataset_meta["palette"] == [[1, 2, 3], [4, 5, 6]]


def test_head_must_have_the_classes_of_the_data(trained, tmp_path):
    _, _, root = trained
    config = small_config(root)
    config.work_dir = str(tmp_path)
    config.model.decode_head.num_classes = 4
    with pytest.raises(ValueError, match=r"model.decode_head.num_classes=4, .* 5 classes"):
        engine.build_train_runner(config).train()


def test_one_class_is_an_error_whatever_the_data_set():
    dataset = SimpleNamespace(metainfo=dict(classes=("blob",)))
    runner = SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=dataset), model=torch.nn.Module()
    )
    with pytest.raises(ValueError, match=r"one class 'blob'.*classes=\('background', 'blob'\)"):
        SegNumClassCheckHook().before_train(runner)


@pytest.mark.slow
@pytest.mark.parametrize("sigmoid", [False, True])
def test_one_kind_of_object_and_background(trained, tmp_path, sigmoid):
    """What the error for one class recommends can be learned."""
    _, _, root = trained
    root = shutil.copytree(root, tmp_path / "data")
    for path in (root / "annotations").rglob("*.png"):
        cv2.imwrite(str(path), np.minimum(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 1))
    config = small_config(root)
    for name in ("train", "val", "test"):
        config[f"{name}_dataloader"].dataset.metainfo = dict(
            classes=("background", "blob"), palette=PALETTE[:2]
        )
    config.model.decode_head.num_classes = 2
    if sigmoid:
        config.model.decode_head.update(out_channels=1, threshold=0.5)
        config.model.decode_head.loss_decode.use_sigmoid = True
    config.train_cfg.update(max_iters=30, val_interval=30)
    config.param_scheduler = None
    losses = tiny.train(config, tmp_path / "work")
    assert 0 < losses[29] < 0.7 * losses[0]


def test_bad_masks_stop_training_before_its_first_step(trained, tmp_path):
    _, _, root = trained
    shutil.copytree(root, tmp_path / "data")
    mask = tmp_path / "data/annotations/validation/000002.png"
    cv2.imwrite(str(mask), np.full((64, 64), 9, np.uint8))
    config = small_config(tmp_path / "data")
    with pytest.raises(ValueError, match=r"validation/000002\.png: has 9"):
        engine.build_train_runner(config).train()
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
def test_two_processes_without_gpu(trained, tmp_path):
    """SyncBN has no CPU kernel: it becomes BN, and both processes train."""
    _, _, root = trained
    config = small_config(root)
    assert config.model.decode_head.norm_cfg.type == "SyncBN"
    config.dump(tmp_path / "config.py")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--master_port=29631", tools_dir() / "train.py", tmp_path / "config.py"),
            *("--launcher", "pytorch", "--work-dir", tmp_path / "work"),
        ],
        check=True,
        timeout=300,
    )
    assert (tmp_path / "work/iter_2.pth").is_file()
