# The recipe of detection_lite_640.py with masks. Source: mmdet's
# configs/rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py.
_base_ = "detection_lite_640.py"

with_masks = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
# Polygons, which are moved and scaled faster than pixels.
outlines = dict(type="LoadAnnotations", with_bbox=True, with_mask=True, poly2mask=False)
# Crops leave objects without an area.
visible = dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1))
train_pipeline = _base_.train_pipeline
train_pipeline[1] = outlines
train_pipeline.insert(-1, visible)
last_pipeline = _base_.last_pipeline
last_pipeline[1] = outlines
last_pipeline.insert(-1, visible)
test_pipeline = _base_.test_pipeline
test_pipeline[2] = with_masks
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[2] = [with_masks]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
custom_hooks = _base_.custom_hooks
custom_hooks[2].switch_pipeline = last_pipeline
