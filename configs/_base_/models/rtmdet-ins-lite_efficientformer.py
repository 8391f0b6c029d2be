# The light detector with masks, with EfficientFormer V1 (L1): backbone and neck of
# gfl-lite_efficientformer.py, and a head for boxes and masks (RTMDet-Ins, arXiv 2212.07784, section
# 3.4) with one tower of 3x3 convolutions. Targets, losses and decoding are mmdet's. Source of the
# settings: mmdet's configs/rtmdet/rtmdet-ins_l_8xb32-300e_coco.py.
_base_ = "gfl-lite_efficientformer.py"
model = dict(
    type="RTMDet",
    # As in the light detector without masks; on a CPU there is no SyncBN.
    use_syncbn=False,
    data_preprocessor=dict(pad_mask=True),
    bbox_head=dict(
        _delete_=True,
        type="mmeformer.LiteRTMDetInsHead",
        num_classes=80,
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_mask=dict(type="DiceLoss", loss_weight=2.0, eps=5e-6, reduction="mean"),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(type="DynamicSoftLabelAssigner", topk=13),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(mask_thr_binary=0.5),
)
