# Semantic FPN with EfficientFormer V1 (L1). The variants differ only in backbone and
# neck. Source of the settings: the reference's segmentation configs
# (snap-research/EfficientFormer, segmentation/configs) on top of mmseg's Semantic FPN.
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        # Training crops; test images keep their size.
        size=(512, 512),
    ),
    backbone=dict(
        type="mmeformer.EfficientFormer",
        arch="l1",
        # A 512 px side has 16 cells at stride 32: every offset of such a map has its own bias.
        bias_grid=16,
        init_cfg=dict(type="Pretrained", checkpoint="timm://efficientformer_l1.snap_dist_in1k"),
    ),
    neck=dict(type="FPN", in_channels=[48, 96, 224, 448], out_channels=256, num_outs=4),
    decode_head=dict(
        type="FPNHead",
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        # Becomes BN with one process or without a GPU.
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    # `--cfg-options model.test_cfg.mode=slide` tests in windows of crop_size that overlap by a third.
    test_cfg=dict(mode="whole", crop_size=(512, 512), stride=(341, 341)),
)
# `mmeformer test --tta`: six scales, each also flipped (tta_pipeline in the data set's base config).
tta_model = dict(type="SegTTAModel")
