# The same detector with EfficientFormer V2 (S0).
_base_ = "rotated-gfl_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(1, 2, 3),
        # The published V2 recipes keep the statistics of all batch norms as pretrained.
        norm_eval=True,
        bias_grid=32,
        # A patch has 21 times as many keys as an ImageNet picture (7 x 7); unscaled, a bias behind
        # the softmax would count 21 times as much and the activations leave the norms' range.
        head_bias_keys=49,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[48, 96, 176]),
)
