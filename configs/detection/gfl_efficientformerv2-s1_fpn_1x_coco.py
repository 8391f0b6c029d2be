_base_ = "gfl_efficientformerv2-s0_fpn_1x_coco.py"
model = dict(
    backbone=dict(
        arch="s1", init_cfg=dict(checkpoint="timm://efficientformerv2_s1.snap_dist_in1k")
    ),
    neck=dict(in_channels=[48, 120, 224]),
)
