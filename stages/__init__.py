"""The stages of the pipeline: one module per stage, each also a plain command (``python -m stages.score --help``)."""

import os

# How threads wait, not what they compute: GNU OpenMP's default is to spin, and on a machine that is not idle two threads of a
# ResNet-20 step then take 3 to 10 s instead of 0.4 to 0.9 s; yielding sooner costs an idle one (benchmarks/README.md). Set
# before torch loads the library; the user's own value stays.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Before torch is imported, which takes seconds: what is edited from here on is seen at the end.
import stages.lib.stage  # noqa: F401
