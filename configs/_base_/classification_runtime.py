_base_ = "default_runtime.py"
default_scope = "mmpretrain"
# Classifier, head and data sets with checks before training.
custom_imports = dict(imports=["mmeformer.classification"], allow_failed_imports=False)
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(save_best="accuracy/top1", rule="greater"),
    visualization=dict(type="VisualizationHook"),
)
# The reference keeps a moving average of the weights too, but its published figures are those of
# the weights themselves. To evaluate and save the average instead, add
# dict(type="EMAHook", momentum=4e-5) here.
custom_hooks = [dict(type="mmeformer.ClassNumCheckHook")]
# Without a name, each run gets its own visualizer and so its own folder for curves.
visualizer = dict(
    type="mmeformer.ClassificationVisualizer", vis_backends=[dict(type="LocalVisBackend")]
)
