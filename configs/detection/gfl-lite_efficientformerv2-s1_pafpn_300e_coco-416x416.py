_base_ = "gfl-lite_efficientformerv2-s0_pafpn_300e_coco-416x416.py"
model = dict(
    backbone=dict(
        arch="s1", init_cfg=dict(checkpoint="timm://efficientformerv2_s1.snap_dist_in1k")
    ),
    neck=dict(in_channels=[48, 120, 224]),
)
