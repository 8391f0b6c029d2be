# The light rotated detector with EfficientFormer V1 (L1): a narrow PAFPN and one tower of
# 3x3 convolutions for classes and boxes, strides 8 to 32. Targets and decoding are those of
# rotated-gfl_efficientformer.py, layers those of gfl-lite_efficientformer.py, losses the full ones
# of GFL (arXiv 2006.04388).
_base_ = "rotated-gfl_efficientformer.py"
model = dict(
    neck=dict(
        _delete_=True,
        type="mmeformer.LitePAFPN",
        in_channels=[96, 224, 448],
        out_channels=128,
        num_csp_blocks=1,
    ),
    bbox_head=dict(
        type="mmeformer.RotatedLiteGFLHead",
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        norm_cfg=dict(_delete_=True, type="BN"),
        anchor_generator=dict(strides=[8, 16, 32]),
        loss_cls=dict(_delete_=True, type="mmdet.QualityFocalLoss", use_sigmoid=True, beta=2.0),
        loss_bbox=dict(loss_weight=2.0),
        loss_dfl=dict(type="mmdet.DistributionFocalLoss", loss_weight=0.25),
    ),
)
