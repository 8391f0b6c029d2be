_base_ = "semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        arch="s2", init_cfg=dict(checkpoint="timm://efficientformerv2_s2.snap_dist_in1k")
    ),
    neck=dict(in_channels=[32, 64, 144, 288]),
)
