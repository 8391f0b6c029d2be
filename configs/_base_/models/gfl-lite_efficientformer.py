# A light GFL with EfficientFormer V1 (L1): a narrow PAFPN and one tower of 3x3 convolutions for
# classes and boxes, strides 8 to 32. Targets, losses and decoding are GFL's. Widths and depths:
# `neck.out_channels` = `bbox_head.in_channels`, `neck.num_csp_blocks`, `bbox_head.feat_channels`,
# `bbox_head.stacked_convs`, `bbox_head.reg_max`. With stride 4, for small objects:
# `backbone.out_indices=(0, 1, 2, 3)`, all widths of the variant in `neck.in_channels`, and
# `anchor_generator.strides=[4, 8, 16, 32]`.
_base_ = "gfl_efficientformer.py"
model = dict(
    backbone=dict(
        # A 640 px side has 20 cells at stride 32: every offset of its map has its own bias.
        bias_grid=20,
    ),
    neck=dict(
        _delete_=True,
        type="mmeformer.LitePAFPN",
        in_channels=[96, 224, 448],
        out_channels=128,
        num_csp_blocks=1,
    ),
    bbox_head=dict(
        type="mmeformer.LiteGFLHead",
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        anchor_generator=dict(strides=[8, 16, 32]),
    ),
)
