# The same detector with EfficientFormer V2 (S0).
_base_ = "gfl_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(1, 2, 3),
        # The published V2 recipes keep the pretrained statistics of all batch norms.
        norm_eval=True,
        bias_grid=25,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformerv2_s0.snap_dist_in1k"),
    ),
    neck=dict(in_channels=[48, 96, 176]),
)
