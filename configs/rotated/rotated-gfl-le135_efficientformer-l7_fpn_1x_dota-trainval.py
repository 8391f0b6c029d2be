_base_ = "rotated-gfl-le135_efficientformer-l1_fpn_1x_dota-trainval.py"
model = dict(
    backbone=dict(arch="l7", init_cfg=dict(checkpoint="timm://efficientformer_l7.snap_dist_in1k")),
    neck=dict(in_channels=[192, 384, 768]),
)
