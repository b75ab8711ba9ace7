"""Train a larger configs/aligner.py on a GPU: 4.3 M parameters in place of 1.0 M, four times the pairs a step.

    python train.py --config=configs/aligner_gpu.py --config.data.dir=runs/pfam:0.45,runs/hmm:0.25,runs/scop40:0.30

No weights of it ship.
"""

from ml_collections import ConfigDict

from configs import aligner


def get_config() -> ConfigDict:
    config = aligner.get_config()
    config.total_steps = 6000
    config.batch_size = 128
    config.data.buckets = (320,)  # one padded length: one compilation, and a GPU has room for padding
    config.model.width = 240
    config.model.depth = 12
    config.checkpoint.every = 500
    config.log.eval_every = 0
    return config
