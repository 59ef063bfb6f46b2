"""prepare: read the images of a setting and store them in a fixed pseudo-random order."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from stages.lib import datasets, own_data, params, runtime, stage, storage
from stages.lib.errors import UserError


def main(args) -> None:
    def parameters():
        return params.setting(args.params, args.setting).data

    spec = parameters()
    if spec.source in params.OWN_SOURCES:
        source = runtime.home() / os.path.expanduser(spec.path)  # Path.expanduser fails on ~nobody
        inputs = [source] if spec.source == "npz" else []  # a folder is compared file by file as it is read
        with stage.Outputs([args.out], inputs, parameters, args.resources) as temporary, stage.naming(args.out):
            notes = own_data.write(spec, source, temporary[args.out])
        print("\n".join([*notes, f"written to {args.out}"]))
        return
    with stage.Outputs([args.out], [], parameters, args.resources) as temporary:
        dataset = datasets.read(spec.source, runtime.load().data_root, image_size=spec.image_size)
        parts = {}
        wanted = (("train", spec.train_per_class, spec.imbalance_factor), ("test", spec.test_per_class, None))
        for part, per_class, factor in wanted:
            images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
            if per_class is not None or factor is not None:
                rows = datasets.subset(images, labels, per_class, factor or 1.0)
                images, labels = images[rows], labels[rows]
            missing = np.setdiff1d(np.arange(len(dataset.class_names)), labels)
            if len(missing):
                raise UserError(f"{spec.source}: class {dataset.class_names[missing[0]]!r} has no {part} images")
            parts |= {f"{part}_images": images, f"{part}_labels": labels}
        dataset = dataclasses.replace(dataset, **parts)
        mean, std = datasets.channel_statistics(dataset.train_images)
        size = max(dataset.train_images.shape[1:3])
        if spec.pad_to is not None and spec.pad_to < size:
            raise UserError(f"data.pad_to is {spec.pad_to}, less than the images' {size} pixels; raise it or set null")
        with stage.naming(args.out):
            storage.write(
                temporary[args.out],
                "dataset",
                {
                    "train/images": dataset.train_images,
                    "train/labels": dataset.train_labels,
                    "test/images": dataset.test_images,
                    "test/labels": dataset.test_labels,
                },
                {
                    "class_names": json.dumps(dataset.class_names),
                    "mean": mean,
                    "std": np.maximum(std, 1 / 255),  # a channel that never changes must not divide by zero
                    "pad_to": spec.pad_to or size,
                },
            )
    print(
        f"{spec.source}: {len(dataset.train_labels)} training and {len(dataset.test_labels)} test images in {args.out}"
    )


if __name__ == "__main__":
    options = stage.parser("prepare", __doc__)
    stage.add_setting(options)
    options.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    stage.add_resources(options)
    stage.run(main, options)
