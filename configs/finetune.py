"""Continue the aligner that ships on alignments of your own.

    python scripts/build_pfam.py --input mine.sto --every-family --pairs-per-family 200 --out runs/my_families
    python eval.py --weights=weights/aligner.safetensors --data=runs/my_families --split=test_iid
    python train.py --config=configs/finetune.py --init-from=weights/aligner.safetensors
    python eval.py --workdir=runs/finetune --split=test_iid

takes a few minutes on 2 CPU cores. Both tables are of sequences that were not trained on.
"""

from configs import aligner, base


def get_config() -> base.ConfigDict:
    return base.changed(
        aligner.get_config(),
        {
            "total_steps": 200,
            "data.dir": "runs/my_families",
            "data.identity_mass": (),  # pairs as they are
            "data.flanks": 0.0,  # flanks and negatives need families of two clans
            "data.negatives": 0.0,
            "optimizer.learning_rate": 2e-4,  # below that of configs/aligner.py: the parameters are near their place
            "optimizer.warmup_steps": 20,
            "optimizer.ema": 0.98,
            "log.eval_every": 0,  # there is no validation split
        },
    )
