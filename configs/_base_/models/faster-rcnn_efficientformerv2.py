# Faster R-CNN with EfficientFormer V2 (S0): the Mask R-CNN without its masks.
_base_ = "mask-rcnn_efficientformerv2.py"
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(mask_roi_extractor=None, mask_head=None),
)
