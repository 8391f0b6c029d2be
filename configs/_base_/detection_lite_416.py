# The recipe of detection_lite_640.py at 416 px.
_base_ = "detection_lite_640.py"

size = (416, 416)
train_pipeline = _base_.train_pipeline
train_pipeline[2].img_scale = size
train_pipeline[3].scale = (size[0] * 2, size[1] * 2)
train_pipeline[4].crop_size = size
train_pipeline[7].size = size
train_pipeline[8].img_scale = size
last_pipeline = _base_.last_pipeline
last_pipeline[2].scale = size
last_pipeline[3].crop_size = size
last_pipeline[6].size = size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = size
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0][0].scale = size
tta_pipeline[1].transforms[0][1].scale = tuple(int(side * 1.2) for side in size)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
custom_hooks = _base_.custom_hooks
custom_hooks[2].switch_pipeline = last_pipeline
