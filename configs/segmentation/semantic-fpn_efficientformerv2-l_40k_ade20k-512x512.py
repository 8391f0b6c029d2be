_base_ = "semantic-fpn_efficientformerv2-s0_40k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="l", init_cfg=dict(checkpoint="timm://efficientformerv2_l.snap_dist_in1k")),
    neck=dict(in_channels=[40, 80, 192, 384]),
)
