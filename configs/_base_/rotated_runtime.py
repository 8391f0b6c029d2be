_base_ = "default_runtime.py"
default_scope = "mmrotate"
# Head, assigner, losses, data set and metric.
custom_imports = dict(imports=["mmeformer.rotated"], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(save_best="dota/AP50", rule="greater"),
    visualization=dict(type="mmdet.DetVisualizationHook"),
)
custom_hooks = [dict(type="mmdet.NumClassCheckHook")]
# Without a name, each run gets its own visualizer and so its own folder for curves.
visualizer = dict(type="mmeformer.RotatedVisualizer", vis_backends=[dict(type="LocalVisBackend")])
