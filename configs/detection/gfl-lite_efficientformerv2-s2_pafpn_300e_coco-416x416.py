_base_ = "gfl-lite_efficientformerv2-s0_pafpn_300e_coco-416x416.py"
model = dict(
    backbone=dict(
        arch="s2", init_cfg=dict(checkpoint="timm://efficientformerv2_s2.snap_dist_in1k")
    ),
    neck=dict(in_channels=[64, 144, 288], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128),
)
