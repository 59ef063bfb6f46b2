"""filter: remove the rows with the highest scores and store the numbers of those that are kept."""

from pathlib import Path

import numpy as np

from stages.lib import params, stage, storage
from stages.lib.errors import UserError


def removed(scores: np.ndarray, n_remove: int) -> np.ndarray:
    """(N,) bool: the `n_remove` rows with the highest of the (N,) scores; among equals the lower row number first."""
    mask = np.zeros(len(scores), bool)
    mask[np.argsort(-scores, kind="stable")[:n_remove]] = True
    return mask


def n_to_remove(spec: params.Filter, n: int, poison_fraction: float | None, n_suspected: int | None) -> int:
    """Rows that the budget allows to remove, from 0 to n - 1; raises `UserError` where it cannot be told."""
    if spec.budget == "auto":
        if n_suspected is None:
            raise UserError("filter.budget is auto, but this defense does not decide for itself; use fraction or rows")
        budget = n_suspected
    elif spec.budget == "fraction":
        if poison_fraction is None:
            raise UserError(
                "filter.budget is fraction, but the poison fraction is not known; use auto or a number of rows"
            )
        budget = round(spec.budget_multiplier * poison_fraction * n)
    else:
        budget = spec.budget
    if not 0 <= budget < n:
        raise UserError(f"the budget is to remove {budget} of {n} rows; expected 0 to {n - 1}: lower filter.budget")
    return budget


def main(args) -> None:
    def parameters():
        return params.filter_(args.params)

    spec = parameters()
    with stage.Outputs([args.out], [args.scores], parameters, args.resources) as temporary:
        with storage.open_(args.scores, "scores") as file:
            scores, attributes = file["scores"][:], dict(file.attrs)
        fraction = storage.optional_fraction(attributes["poison_fraction"])
        n_remove = n_to_remove(spec, len(scores), fraction, attributes.get("n_suspected"))
        kept = np.flatnonzero(~removed(scores, n_remove))
        # No digest of the scores: other scores that pick the same rows give the same file, and nothing is trained again.
        with stage.naming(args.out):
            storage.write(
                temporary[args.out], "kept_rows", {"rows": kept}, {"n": len(scores), "index": attributes["index"]}
            )
    print(f"{n_remove} of {len(scores)} rows removed, {len(kept)} kept")


if __name__ == "__main__":
    options = stage.parser("filter", __doc__)
    options.add_argument("--params", type=Path, default=Path("params.yaml"), help="file with the block `filter`")
    options.add_argument("--scores", type=Path, required=True, help="output of score")
    options.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    stage.add_resources(options)
    stage.run(main, options)
