# The same light detector with EfficientFormer V2 (S0).
_base_ = "gfl-lite_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(1, 2, 3),
        bias_grid=20,
        # A 640 px image has 8 times as many keys as an ImageNet image (7 x 7). Without this, the
        # bias after the softmax has 8 times the weight.
        head_bias_keys=49,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[48, 96, 176], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96),
)
