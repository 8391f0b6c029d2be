# Your own images, one folder per class: copy this file and change the three lines below.
_base_ = "efficientformerv2-s0_300e_in1k.py"

# ---- always changed -------------------------------------------------------------------------
data_root = "data/my_dataset/"  # has train/ and val/, each with one folder per class
metainfo = dict(classes=("cat", "dog"))  # the names of the folders
checkpoint = "timm://efficientformerv2_s0.snap_dist_in1k"  # backbone weights; None: from scratch

# ---- often changed --------------------------------------------------------------------------
crop = 224  # side of the network's input, pixels
resize = 256  # the shorter side of test images before the crop
batch_size = 32  # per GPU
learning_rate = 2e-4
max_epochs = 20
warmup_epochs = 1
num_workers = 2
# Learn from a larger classifier of this project: dict(config="...", checkpoint="...").
teacher = dict()
# Raw imagery: type="mmeformer.LoadImageFromFile" with the bands of red, green and blue, and the
# values of black and white, such as bands=(4, 3, 2), stretch=(0, 4095).
load_image = dict(type="LoadImageFromFile")

# ---- rarely changed -------------------------------------------------------------------------
scratch = checkpoint is None
num_classes = len(metainfo["classes"])
model = dict(
    data_preprocessor=dict(num_classes=num_classes),
    backbone=dict(
        # From scratch, start with large layer scales.
        layer_scale_init_value=0.5 if scratch else None,
        bias_grid=-(-crop // 32) if scratch else 7,
        head_bias_keys=(-(-crop // 32)) ** 2 if scratch else 49,
        init_cfg=None if scratch else dict(type="Pretrained", checkpoint=checkpoint),
    ),
    head=dict(
        num_classes=num_classes,
        # Without a teacher one classifier is enough.
        distillation=bool(teacher),
        loss=dict(num_classes=num_classes),
    ),
    # Mixing is for long trainings.
    train_cfg=dict(_delete_=True),
    teacher=dict(_delete_=True, **teacher),
)
train_pipeline = [
    load_image,
    dict(
        type="RandomResizedCrop", scale=crop, crop_ratio_range=(0.3, 1.0), interpolation="bicubic"
    ),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="ColorJitter", brightness=0.1, contrast=0.1, saturation=0.1),
    dict(type="PackInputs"),
]
test_pipeline = [
    load_image,
    dict(type="ResizeEdge", scale=resize, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=crop),
    dict(type="PackInputs"),
]
dataset = dict(type="mmeformer.ImageFolderDataset", data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=num_workers,
    persistent_workers=num_workers > 0,
    dataset=dict(pipeline=test_pipeline, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, min(5, num_classes)))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=warmup_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-6,
        by_epoch=True,
        begin=warmup_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=learning_rate))
# `mmeformer train --auto-scale-lr` scales the learning rate, which is for this batch size.
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(logger=dict(interval=10))
