"""Train r2_dustbin with Sparse Sinkhorn Attention (arXiv 2002.11296) as the encoder's self-attention.

    python train.py --config=configs/sparse_sinkhorn.py --config.data.dir=runs/pfam --config.total_steps=400

On test_ood, step 400: reconstruction 1.92 nats, masked 2.23, sparse CE 1.27 nats, barycenter MAE 2.44 residues, F1 .75:
a little worse than r2_dustbin on each (docs/sparse.md).
"""

from configs import base, r2_dustbin


def get_config() -> base.ConfigDict:
    return base.changed(r2_dustbin.get_config(), {"attention.kind": "sparse_sinkhorn"})
