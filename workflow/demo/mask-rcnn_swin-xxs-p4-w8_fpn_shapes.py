"""Mask R-CNN with a very small Swin Transformer for the 256 px images of ``shapes``.

What differs from mmdet's Mask R-CNN stands here, and all that matters for the training.
`snakemake train_demo` draws the images and trains it.
"""

_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
default_scope = "mmdet"

classes = (
    "triangle", "square", "pentagon", "star", "cross",
    "ring", "ellipse", "crescent", "heart", "arrow",
)  # fmt: skip
metainfo = dict(classes=classes)
data_root = "data/shapes/"
image_scale = (256, 256)
# Training begins with small copies of the images, which are a quarter of the work: what is learnt
# about an object of 100 px there holds for one of 50 px later.
train_scales = [(128, 128), (192, 192), image_scale, image_scale]
epochs_per_scale = 1
max_epochs = epochs_per_scale * len(train_scales)

embed_dims = 32
channels = 48
mask_channels = 32

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        pretrain_img_size=256,
        embed_dims=embed_dims,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=8,
        mlp_ratio=4,
        qkv_bias=True,
        drop_path_rate=0.0,
        patch_norm=True,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(
        in_channels=[embed_dims * 2**stage for stage in range(4)],
        out_channels=channels,
    ),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[5]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2), out_channels=channels, finest_scale=28
        ),
        bbox_head=dict(
            in_channels=channels,
            fc_out_channels=256,
            num_classes=len(classes),
            reg_class_agnostic=True,
        ),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2), out_channels=channels, finest_scale=28
        ),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=mask_channels,
            num_classes=len(classes),
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(max_per_img=50),
    ),
)

train_pipelines = [
    [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="Resize", scale=scale, keep_ratio=True),
        dict(
            type="RandomFlip",
            prob=[0.25, 0.25, 0.25],
            direction=["horizontal", "vertical", "diagonal"],
        ),
        dict(type="PackDetInputs"),
    ]
    for scale in train_scales
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipelines[0],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(
    type="CocoMetric",
    ann_file=data_root + "annotations/instances_val.json",
    metric=["bbox", "segm"],
)
test_cfg = dict(type="TestLoop")

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        convert_to_iter_based=True,
        begin=epochs_per_scale,
        end=max_epochs,
        T_max=max_epochs - epochs_per_scale,
        eta_min_ratio=0.01,
    ),
]
custom_hooks = [
    dict(
        type="PipelineSwitchHook",
        switch_epoch=epochs_per_scale * index,
        switch_pipeline=train_pipelines[index],
    )
    for index in range(1, len(train_scales))
]

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1, save_optimizer=False),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(
    type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer"
)
