_base_ = "semantic-fpn_efficientformer-l1_40k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="l3", init_cfg=dict(checkpoint="timm://efficientformer_l3.snap_dist_in1k")),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
