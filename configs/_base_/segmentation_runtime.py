_base_ = "default_runtime.py"
default_scope = "mmseg"
# Data sets with checks before training.
custom_imports = dict(imports=["mmeformer.segmentation"], allow_failed_imports=False)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=4000, save_best="mIoU", rule="greater"),
    visualization=dict(type="SegVisualizationHook"),
)
custom_hooks = [dict(type="mmeformer.SegNumClassCheckHook")]
# Without a name, each run gets its own visualizer and so its own folder for curves.
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=False)
