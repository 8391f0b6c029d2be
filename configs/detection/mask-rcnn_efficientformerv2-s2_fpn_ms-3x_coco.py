_base_ = "mask-rcnn_efficientformerv2-s0_fpn_ms-3x_coco.py"
model = dict(
    backbone=dict(
        arch="s2", init_cfg=dict(checkpoint="timm://efficientformerv2_s2.snap_dist_in1k")
    ),
    neck=dict(in_channels=[32, 64, 144, 288]),
)
