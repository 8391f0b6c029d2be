# RetinaNet with a rotated GFL head and EfficientFormer V1 (L1): five levels of strides 8 to 128, one
# square anchor per location, boxes in le135. Source of the settings: the published DOTA result of
# EfficientFormer-L1 and mmrotate's RetinaNet. The variants differ only in backbone and neck.
model = dict(
    type="mmdet.RetinaNet",
    data_preprocessor=dict(
        type="mmdet.DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        boxtype2tensor=False,
    ),
    backbone=dict(
        type="mmeformer.EfficientFormer",
        arch="l1",
        out_indices=(1, 2, 3),
        # A 1024 px patch has 32 cells at stride 32: every offset of its map has its own bias.
        bias_grid=32,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformer_l1.snap_dist_in1k"),
    ),
    neck=dict(
        type="mmdet.FPN",
        in_channels=[96, 224, 448],
        out_channels=256,
        add_extra_convs="on_output",
        num_outs=5,
    ),
    bbox_head=dict(
        type="mmeformer.RotatedGFLHead",
        num_classes=15,
        in_channels=256,
        feat_channels=256,
        stacked_convs=4,
        norm_cfg=dict(type="GN", num_groups=32, requires_grad=True),
        anchor_generator=dict(
            type="mmrotate.FakeRotatedAnchorGenerator",
            angle_version="le135",
            scales=[4],
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(
            type="mmeformer.DeltaXYWHTRBBoxCoder",
            angle_version="le135",
            norm_factor=None,
            edge_swap=False,
            proj_xy=True,
            target_means=(0.0, 0.0, 0.0, 0.0, 0.0),
            target_stds=(1.0, 1.0, 1.0, 1.0, 1.0),
        ),
        reg_max=8,
        delta_range=(-2, 2),
        angle_range=(-5, 2),
        loss_cls=dict(
            type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0
        ),
        loss_bbox=dict(type="mmeformer.RotatedIoULoss", mode="log", loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(type="mmeformer.RotatedATSSAssigner", topk=9),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=2000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms_rotated", iou_threshold=0.1),
        max_per_img=2000,
    ),
)
