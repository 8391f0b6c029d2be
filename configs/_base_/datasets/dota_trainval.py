# Trains on the patches of train and val, tests on those of test, which have no public labels:
# merges the results to full images and writes a Task 1 submission.
_base_ = "dota.py"
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="ConcatDataset",
        datasets=[
            dict(
                type=_base_.dataset_type,
                data_root=_base_.data_root,
                ann_file=f"{split}/annfiles/",
                data_prefix=dict(img_path=f"{split}/images/"),
                filter_cfg=dict(filter_empty_gt=True),
                pipeline=_base_.train_pipeline,
            )
            for split in ("train", "val")
        ],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=_base_.dataset_type,
        data_root=_base_.data_root,
        ann_file="",
        data_prefix=dict(img_path="test/images/"),
        test_mode=True,
        pipeline=_base_.test_pipeline,
    ),
)
test_evaluator = dict(
    _delete_=True,
    type="mmeformer.DOTAMetric",
    merge_patches=True,
    submission_dir="work_dirs/dota_submission",
)
