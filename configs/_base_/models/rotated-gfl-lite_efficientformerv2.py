# The same light detector with EfficientFormer V2 (S0).
_base_ = "rotated-gfl-lite_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(1, 2, 3),
        # As in rotated-gfl_efficientformerv2.py.
        norm_eval=True,
        bias_grid=32,
        head_bias_keys=49,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[48, 96, 176], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96),
)
