# SPDX-License-Identifier: Apache-2.0
"""What a prediction depends on besides its own picture: never the batch, but the padding.

mmseg batches pictures of one size, and pads them only where ``data_preprocessor.test_cfg`` says so.
Attention (both versions) and the pyramid's group norm (V1) look at the whole map, padding included,
so there padded and unpadded predictions differ by design of the method. Convolutions see padding
only as far as their receptive field reaches. That is why the configs resize rather than pad.
"""

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmeformer.configs import drop_pretrained
from mmeformer.paths import config_dir

NO_ATTENTION = dict(
    widths=(32, 48, 96, 176), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 0), mlp_ratios=2.0
)


def build(name: str, **backbone):
    """The segmentor of a published config, whose blocks, norms and head all show in the logits."""
    path = config_dir() / f"segmentation/semantic-fpn_{name}_40k_ade20k-512x512.py"
    config = Config.fromfile(path)
    init_default_scope(config.default_scope)
    drop_pretrained(config.model)
    config.model.backbone.update(layer_scale_init_value=0.5, **backbone)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    for key, parameter in model.named_parameters():
        if key.endswith(("attention_bias.table", "conv_seg.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model, inputs: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 150, H, W), whole mode."""
    size = tuple(inputs.shape[-2:])
    metas = [dict(ori_shape=size, img_shape=size, pad_shape=size)] * len(inputs)
    with torch.no_grad():
        return model.inference(inputs, metas)


@pytest.mark.parametrize("arch", ["efficientformer-l1", "efficientformerv2-s0"])
def test_batch_of_one_equals_a_padded_batch(arch):
    model = build(arch)
    pictures = torch.randn(3, 3, 61, 93)
    padded = F.pad(pictures, (0, 3, 0, 3))
    together = logits(model, padded)
    for index in range(3):
        alone = logits(model, padded[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)
        assert (together[index].argmax(0) == alone[0].argmax(0)).float().mean() > 0.999
    assert together.std(dim=(-2, -1)).max() > 0.01, "constant logits would prove nothing"


def test_padding_is_cut_off_again():
    """Through mmseg's own padding: the prediction has the size of the picture."""
    model = build("efficientformerv2-s0")
    model.data_preprocessor.test_cfg = dict(size_divisor=32)
    pictures = [torch.randint(0, 256, (3, 61, 93), dtype=torch.uint8) for _ in range(2)]
    samples = [
        SegDataSample(metainfo=dict(ori_shape=(61, 93), img_shape=(61, 93))) for _ in range(2)
    ]
    with torch.no_grad():
        results = model.test_step(dict(inputs=pictures, data_samples=samples))
    normalised = [(x[[2, 1, 0]].float() - model.data_preprocessor.mean) for x in pictures]
    batch = torch.stack([x / model.data_preprocessor.std for x in normalised])
    expected = logits(model, F.pad(batch, (0, 3, 0, 3)))[..., :61, :93]
    for result, reference in zip(results, expected, strict=True):
        assert result.pred_sem_seg.data.shape == (1, 61, 93)
        torch.testing.assert_close(result.seg_logits.data, reference, atol=1e-4, rtol=1e-4)


def difference(model, left: int) -> float:
    """Largest change in the logits of the first ``left`` columns when a picture is padded."""
    picture = torch.randn(1, 3, 32, 512)
    plain = logits(model, picture)
    padded = logits(model, F.pad(picture, (0, 128)))[..., :512]
    change = (plain - padded)[..., :left].abs().max() / plain.abs().max()
    return float(change)


def test_without_attention_padding_is_seen_only_nearby():
    model = build("efficientformerv2-s0", arch=NO_ATTENTION)
    # Stage 4 of V2 has an attention downsample; without it the reach is the convolutions' own.
    model.backbone.stages[3].downsample.attn = None
    assert difference(model, left=512) > 1e-3
    assert difference(model, left=224) < 1e-5


@pytest.mark.parametrize("arch", ["efficientformer-l1", "efficientformerv2-s0"])
def test_attention_sees_padding_everywhere(arch):
    """The limit of the method: no tolerance hides it, so padded batches are not promised."""
    assert difference(build(arch), left=64) > 1e-4
