# Recipe of light detectors on COCO at 416 px: data, schedule and hooks. Source: mmdet's
# configs/rtmdet/rtmdet_tiny_8xb32-300e_coco.py.
_base_ = [
    "datasets/coco_mosaic_416.py",
    "schedules/adamw_lite_300e.py",
    "detection_runtime.py",
]
default_hooks = dict(checkpoint=dict(interval=10))
custom_hooks = [
    dict(type="NumClassCheckHook"),
    dict(
        type="EMAHook",
        ema_type="ExpMomentumEMA",
        momentum=2e-4,
        update_buffers=True,
        priority=49,
    ),
    dict(type="PipelineSwitchHook", switch_epoch=280, switch_pipeline={{_base_.last_pipeline}}),
]
