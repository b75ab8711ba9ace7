"""Train a model: state and update, devices and processes, checkpoints, the folder and the session of a run."""
