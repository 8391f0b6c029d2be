# GFL with FPN and EfficientFormer V1 (L1): five levels of strides 8 to 128, one anchor point per
# location. The variants differ only in backbone and neck. Source of the settings: mmdet's
# configs/gfl/gfl_r50_fpn_1x_coco.py.
model = dict(
    type="GFL",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="mmeformer.EfficientFormer",
        arch="l1",
        # Strides 8, 16 and 32: the same as all four and `start_level=1` of the neck, without
        # unused parameters.
        out_indices=(1, 2, 3),
        # An 800 px side has 25 cells at stride 32: every offset of such a map has its own bias.
        bias_grid=25,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformer_l1.snap_dist_in1k"),
    ),
    neck=dict(
        type="FPN",
        in_channels=[96, 224, 448],
        out_channels=256,
        add_extra_convs="on_output",
        num_outs=5,
    ),
    bbox_head=dict(
        type="GFLHead",
        num_classes=80,
        in_channels=256,
        feat_channels=256,
        stacked_convs=4,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=[8, 16, 32, 64, 128],
        ),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
        reg_max=16,
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.6),
        max_per_img=100,
    ),
)
tta_model = dict(
    type="mmeformer.InstanceTTAModel",
    tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.6), max_per_img=100),
)
