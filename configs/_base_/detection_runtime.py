_base_ = "default_runtime.py"
default_scope = "mmdet"
# COCO data set with checks, and test-time augmentation with masks.
custom_imports = dict(imports=["mmeformer.detection"], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(save_best="coco/bbox_mAP", rule="greater"),
    visualization=dict(type="DetVisualizationHook"),
)
custom_hooks = [dict(type="NumClassCheckHook")]
# Without a name, each run gets its own visualizer and so its own folder for curves.
visualizer = dict(type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
