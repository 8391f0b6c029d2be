_base_ = "gfl_efficientformer-l1_fpn_1x_coco.py"
model = dict(
    backbone=dict(arch="l7", init_cfg=dict(checkpoint="timm://efficientformer_l7.snap_dist_in1k")),
    neck=dict(in_channels=[192, 384, 768]),
)
