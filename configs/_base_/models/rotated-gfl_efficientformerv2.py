# The same detector with EfficientFormer V2 (S0).
_base_ = "rotated-gfl_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(1, 2, 3),
        # The published V2 recipes keep the pretrained statistics of all batch norms.
        norm_eval=True,
        bias_grid=32,
        # A patch has 21 times as many keys as an ImageNet image (7 x 7). Without this, the bias
        # after the softmax has 21 times the weight and activations leave the range of the norms.
        head_bias_keys=49,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[48, 96, 176]),
)
