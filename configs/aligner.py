"""Train the aligner that ships: scores of an encoder by relaxed transport, ordered by a pair HMM.

    python train.py --config=configs/pretrain.py
    python train.py --config=configs/aligner.py --init-from=runs/pretrain \\
      --config.data.dir=runs/pfam:0.45,runs/hmm:0.25,runs/scop40:0.30
    python scripts/export_weights.py --workdir=runs/aligner --calibrate=runs/pfam --output=weights/aligner.safetensors

A step of 32 pairs takes 2 s on 2 CPU cores. Data, figures and what was tried: docs/results.md, docs/aligner.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.task = "pair_hmm"
    config.total_steps = 1300
    config.data.buckets = (96, 144, 200, 256, 320)
    config.data.pairs_per_family = 30  # so half of the pairs of seeds come from deep families, half from two-row ones
    config.data.identity_mass = (0.06, 0.10, 0.10, 0.10, 0.14, 0.30, 0.20)  # half below .40, where help is needed
    config.data.crop = 0.25  # as sequences of users need not begin and end together
    config.data.stagger = 0.1
    config.data.flanks = 0.5  # as domains of users lie in longer proteins
    config.data.negatives = 0.1
    config.model = {
        "width": 144,  # of the encoder's features
        "depth": 8,  # residual convolution blocks
        "kernel": 5,  # residues
        "dilations": 5,  # of the convolutions, in turn: 1, 2, 4, 8, 16, and again
        "heads": 4,
        "attention_every": 0,  # no self-attention
        "implementation": "auto",
        "dtype": "float32",
        "residual_scale": 0.3,
        "plan_width": 64,  # channels whose products are scores
        "plan_gain": 0.5,  # begin near BLOSUM62, which aligns better than hundreds of steps from noise
        "learn_gaps": True,
        "contextual_gaps": True,  # opening a gap costs more or less at each residue
    }
    config.loss = {"alignment": 1.0, "masked": 6.0, "mask_rate": 0.15}
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.ema = 0.995
    config.checkpoint.every = 100
    config.log.eval_splits = ("validation", "validation_flanked", "negatives")
    return config
