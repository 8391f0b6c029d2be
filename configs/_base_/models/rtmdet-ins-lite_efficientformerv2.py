# The same light detector with masks with EfficientFormer V2 (S0).
_base_ = "rtmdet-ins-lite_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(1, 2, 3),
        # As in gfl-lite_efficientformerv2.py.
        bias_grid=20,
        head_bias_keys=49,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[48, 96, 176], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96),
)
