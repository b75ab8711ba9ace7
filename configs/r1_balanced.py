"""Train with one tail step (R = 1) and without dustbin, so that every residue of x is sent somewhere.

    python train.py --config=configs/r1_balanced.py --config.data.dir=runs/pfam --config.total_steps=400

takes 5 to 8 minutes with compilation on 2 busy CPU cores (shards of 4,761 training families). On test_ood, step 0 ->
400: reconstruction 3.08 -> 2.05 nats, masked 3.08 -> 2.31, sparse CE 2.91 -> 1.62 nats, barycenter MAE 9.03 -> 2.57
residues (scaled diagonal 2.76), F1 0.73 -> 0.68 (scaled diagonal 0.42, Needleman-Wunsch 0.91).
"""

from configs import base


def get_config() -> base.ConfigDict:
    return base.changed(base.get_config(), {"attention.tail_steps": 1, "attention.dustbin": "none"})
