"""What the stages are made of. Split by what an edit must invalidate: `dvc.yaml` lists each module as a dependency."""
