"""extract: penultimate features and logits of every training sample under the victim, without augmentation."""

from pathlib import Path

import numpy as np

from stages.lib import checkpoints, device, inference, runtime, stage, storage
from stages.lib.poisoning import open_poisoned


def main(args) -> None:
    inputs = [args.data, args.index, args.checkpoint]
    with stage.Outputs([args.out], inputs, resources=args.resources) as temporary:
        poisoned = open_poisoned(args.data, args.index)
        digests = storage.digest(args.data), storage.digest(args.index)
        checkpoint = checkpoints.load_for(args.checkpoint, args.data, args.index, digests)
        training_set = poisoned.train()
        n = poisoned.index.n
        # The fraction is what a defense may be told; which rows are poisoned stays in the index.
        fraction = poisoned.index.poison_fraction
        attributes = {
            "poison_fraction": np.nan if fraction is None else fraction,
            "index": digests[1],
            "checkpoint": storage.digest(args.checkpoint),
        }
        model, where = checkpoint.model(), device.decide(runtime.load()).device
        with stage.naming(args.out), storage.create(temporary[args.out], "features", attributes) as file:
            features = file.create_dataset("features", (n, model.n_features), np.float32)
            logits = file.create_dataset("logits", (n, poisoned.n_classes), np.float32)
            file.create_dataset("labels", data=training_set.labels)
            row = 0
            for chunk in inference.outputs(model, checkpoint.architecture, training_set.images, where):
                end = row + len(chunk[0])
                features[row:end], logits[row:end] = chunk
                row = end
    print(f"features ({n}, {model.n_features}) and logits ({n}, {poisoned.n_classes}) in {args.out}")


if __name__ == "__main__":
    options = stage.parser("extract", __doc__)
    options.add_argument("--data", type=Path, required=True, help="output of prepare")
    options.add_argument("--index", type=Path, required=True, help="output of poison")
    options.add_argument("--checkpoint", type=Path, required=True, help="output of train")
    options.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    stage.add_resources(options)
    stage.run(main, options)
