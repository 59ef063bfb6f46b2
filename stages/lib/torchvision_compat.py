"""The one place that imports torchvision."""

import importlib
import sys
from types import ModuleType

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # a torch.library.Library takes its schemas with it when it is collected


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not load.

    A torchvision wheel built for CUDA beside a CPU build of torch cannot load its operator library, and its own
    registration of the two operators below then ends the import. Declared by hand, they let the import pass; they
    have no kernel, and nothing here calls them. This can go when no supported installation mixes the two builds, or
    when torchvision guards those two registrations as it guards its others.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the half-imported ones
    library = importlib.import_module("torch.library").Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")
