"""Where a run keeps its files: a folder that all nodes share, or a bucket with a local copy on each node."""
