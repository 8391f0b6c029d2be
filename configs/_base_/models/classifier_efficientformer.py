# EfficientFormer V1 (L1) as an ImageNet classifier. The variants differ only in backbone and width.
# Source: arXiv 2206.01191; snap-research/EfficientFormer, main.py and util/.
model = dict(
    type="mmeformer.Classifier",
    data_preprocessor=dict(
        type="ClsDataPreprocessor",
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type="mmeformer.EfficientFormer", arch="l1", out_indices=(3,), pyramid_norms=False
    ),
    head=dict(
        type="mmeformer.EfficientFormerHead",
        family="v1",
        in_channels=448,
        num_classes=1000,
        # With a teacher: half of the loss is on its best class.
        kind="hard",
        alpha=0.5,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=1000, mode="original"),
    ),
    # One of the two for every batch.
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
    # The published teacher; read when training starts. For training without one:
    # `--cfg-options model.teacher=None`.
    teacher=dict(timm="regnety_160.deit_in1k"),
)
