# The same classifier with EfficientFormer V2 (S0).
_base_ = "classifier_efficientformer.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmeformer.EfficientFormerV2",
        arch="s0",
        out_indices=(3,),
        # No effect at 224 px (7 x 7 keys); lets images be larger.
        head_bias_keys=49,
    ),
    head=dict(family="v2", in_channels=176),
)
