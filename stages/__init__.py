"""The stages of the pipeline: one module per stage, each also a plain command (``python -m stages.score --help``)."""

import os

# How threads wait, not what they compute: GNU OpenMP spins 300,000 times at a barrier before it sleeps, which costs much
# where other processes want the cores, and too few cost on idle ones (benchmarks/README.md). The user's own value stays.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch loads the library

# Before torch is imported, which takes seconds: what is edited from here on is seen at the end.
import stages.lib.stage  # noqa: F401
