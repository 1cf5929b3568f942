"""The impure edge: configuration, metrics, checkpoints, pictures, reports, and the loop that ties them to a run."""
