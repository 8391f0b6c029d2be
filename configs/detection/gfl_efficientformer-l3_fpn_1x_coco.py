_base_ = "gfl_efficientformer-l1_fpn_1x_coco.py"
model = dict(
    backbone=dict(arch="l3", init_cfg=dict(checkpoint="timm://efficientformer_l3.snap_dist_in1k")),
    neck=dict(in_channels=[128, 320, 512]),
)
