"""The stages of the pipeline: one module per stage, each also a plain command (``python -m stages.score --help``)."""
