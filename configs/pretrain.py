"""Train the encoder of configs/aligner.py on unaligned sequences, to predict masked residues.

    python scripts/build_sequences.py --input swissprot50.fasta.gz --out runs/sequences
    python train.py --config=configs/pretrain.py
    python eval.py --workdir=runs/pretrain --split=test_ood
    python train.py --config=configs/aligner.py --config.data.dir=runs/pfam --init-from=runs/pretrain

A step of 64 sequences takes 1 to 2 s on 2 CPU cores. 400 steps of 32 sequences of a smaller encoder brought a
perplexity of 17.1 on 1,000 validation sequences, 18.1 by the composition alone (unigram).
"""

from ml_collections import ConfigDict

from configs import aligner, base

_OF_THE_ENCODER = (
    *("width", "depth", "kernel", "dilations", "heads", "attention_every", "implementation", "dtype"),
    "residual_scale",
)


def get_config() -> ConfigDict:
    config, encoder = base.get_config(), aligner.get_config().model
    config.task = "masked_residues"
    config.total_steps = 5000
    config.batch_size = 64  # sequences
    config.data = {"dir": "runs/sequences", "buckets": (128, 256, 512), "join": False, "workers": 0, "prefetch": 4}
    config.model = {name: encoder[name] for name in _OF_THE_ENCODER}  # so that an aligner can begin from it
    config.loss = {"mask_rate": 0.15}
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.checkpoint.every = 250
    config.log.every = 10
    config.log.eval_every = 250
    return config
