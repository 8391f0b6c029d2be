_base_ = "gfl_efficientformerv2-s0_fpn_1x_coco.py"
model = dict(
    backbone=dict(arch="l", init_cfg=dict(checkpoint="timm://efficientformerv2_l.snap_dist_in1k")),
    neck=dict(in_channels=[80, 192, 384]),
)
