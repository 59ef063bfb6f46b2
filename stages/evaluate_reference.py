"""evaluate_reference: clean accuracy and attack success of the undefended victim and of the oracle filter's model.

The oracle filter removes all the poison and nothing else: the best that any defense can do. Both depend on setting and
seed alone, so that every defense is set beside the same figures.
"""

import json
from pathlib import Path

from stages.lib import checkpoints, device, metrics, runtime, stage, storage
from stages.lib.poisoning import open_poisoned


def main(args) -> None:
    inputs = [args.data, args.index, args.victim, args.oracle]
    with stage.Outputs([args.out], inputs, resources=args.resources) as temporary:
        poisoned = open_poisoned(args.data, args.index)
        digests = storage.digest(args.data), storage.digest(args.index)
        where = device.decide(runtime.load()).device
        found = {"index": digests[1]}
        for name, path in (("undefended", args.victim), ("oracle", args.oracle)):
            checkpoint = checkpoints.load_for(path, args.data, args.index, digests)
            found[name] = metrics.of_model(checkpoint, poisoned, where) | {
                "checkpoint": storage.digest(path),
                "history": checkpoint.history,
                "runtime": checkpoint.conditions["runtime"],
                "collapses": checkpoint.conditions["collapses"],
            }
        if "asr" in found["oracle"]:
            oracle = found["oracle"]
            oracle["defense_score"] = metrics.defense_score(oracle["clean_acc"], oracle["asr"], 1.0)
        temporary[args.out].write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    options = stage.parser("evaluate_reference", __doc__.partition("\n")[0])
    options.add_argument("--data", type=Path, required=True, help="output of prepare")
    options.add_argument("--index", type=Path, required=True, help="output of poison")
    options.add_argument("--victim", type=Path, required=True, help="checkpoint trained on all rows")
    options.add_argument("--oracle", type=Path, required=True, help="checkpoint trained on all but the poison")
    options.add_argument("--out", type=Path, required=True, help="JSON file to write")
    stage.add_resources(options)
    stage.run(main, options)
