# The same segmentor with EfficientFormer V2 (S0).
_base_ = "semantic-fpn_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        # The published V2 recipe keeps the pretrained statistics of all batch norms.
        norm_eval=True,
        bias_grid=16,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[32, 48, 96, 176]),
)
