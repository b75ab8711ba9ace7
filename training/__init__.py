"""Train a model: state and update, checkpoints, meshes of devices, the folder of a run."""
