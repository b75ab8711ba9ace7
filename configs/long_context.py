"""Train an encoder with banded Sinkhorn self-attention on rows of 131,072 places, each of some 330 joined sequences.

    python scripts/build_sequences.py --input swissprot50.fasta.gz --out runs/sequences
    python train.py --config=configs/long_context.py                                      # 8 devices share a row
    python train.py --config=configs/long_context.py --config.data.buckets="(2048,)" --config.mesh.sequence=1
    python eval.py --workdir=runs/long_context --split=test_ood

The third command is the small one, for a single device or a CPU. No sequence of a row sees another one: the support of
the attention ends at its ends (docs/data.md, "Long rows"). Validation is of single sequences.
"""

from ml_collections import ConfigDict

from configs import pretrain


def get_config() -> ConfigDict:
    config = pretrain.get_config()
    config.total_steps = 1000  # rows; 420 hold as many sequences as there are
    config.batch_size = 1  # row
    config.data.join = True
    config.data.buckets = (512, 2048, 131_072)  # the last one of rows, the others of validation
    config.model.attention_every = 4  # an aligner with the same value can begin from it
    # Without a dustbin, which would couple the sequences. Balanced plans of a narrow band need many steps.
    config.attention.tau_a = config.attention.tau_b = 0.9
    config.mesh.data = 1  # a row is not divided among groups
    config.mesh.sequence = 8  # devices that share it
    config.checkpoint.every = 50
    config.log.eval_every = 50
    return config
