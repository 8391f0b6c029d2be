_base_ = "gfl_efficientformerv2-s0_fpn_1x_coco.py"
model = dict(
    backbone=dict(
        arch="s2", init_cfg=dict(checkpoint="timm://efficientformerv2_s2.snap_dist_in1k")
    ),
    neck=dict(in_channels=[64, 144, 288]),
)
