"""Settings that all configurations share; train with another one: `python train.py --config=configs/r2_balanced.py`.

For every key, 0 means off or none, -1 means all, and None is never needed. Values are checked before a run begins.
"""

from ml_collections import ConfigDict


def changed(config: ConfigDict, settings: dict) -> ConfigDict:
    """Set the values of dotted names."""
    config.update_from_flattened_dict(settings)
    return config


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "total_steps": 600,
            "batch_size": 32,  # pairs a step, over all devices
            "seed": 0,
            "data": {
                "dir": "data/default",  # shards of scripts/build_pfam.py; or several: "runs/pfam:1,runs/hmm:0.5"
                "buckets": (64, 128, 192, 256, 384),  # padded lengths in residues; longer pairs are left out
                "pairs_per_family": 100,  # largest weight of a family, else its number of pairs; -1 for no limit
                "identity_mass": (),  # shares of pairs with identity below .15, .20, .25, .30, .40, .60, 1; () for none
                "crop": 0.0,  # share of pairs in which one sequence loses up to half at one end
                "stagger": 0.0,  # share of pairs x = A B, y = B C, cut out of longer ones
                "noise": 0.0,  # share of pairs that lose up to 30 % of their residues to substitutions
                "flanks": 0.0,  # share of pairs with unrelated residues at their ends, half of them more than 40
                "negatives": 0.0,  # share of pairs of different clans, which are aligned nowhere
                "workers": 0,  # processes that make batches; 0 for a thread
                "prefetch": 4,  # batches made ahead, by each worker
                "max_bad_records": 0,  # damaged records that may be left out of a split
            },
            "model": {
                "width": 128,  # of the encoder's features
                "depth": 6,  # residual convolution blocks
                "kernel": 5,  # residues
                "dilations": 4,  # of the convolutions, in turn: 1, 2, 4, 8, and again
                "heads": 4,  # of the self-attention
                "attention_every": 3,  # blocks between layers of self-attention; 0 for none
                "residual_scale": 1.0,  # of the untrained convolution blocks' outputs
                "plan_width": 64,  # of queries and keys of the plan
                "plan_gain": 1.0,  # scale of the untrained projection to them; below 1, scores begin beside a prior
                "value_width": 64,  # of what the plan carries from y to x
                "substitution_prior": False,  # begin from BLOSUM62, with a learned weight
                "positions": True,  # rotate half of queries and keys by length-scaled positions: a pull to the diagonal
                "refinement": 0,  # convolution blocks that refine a first plan into a second one; 0 for none
                "implementation": "auto",  # of the attention; or "reference", "xla", "pallas_tpu", "pallas_gpu"
                "dtype": "float32",  # of the encoder's arithmetic; or "bfloat16"; parameters and plan stay float32
            },
            "attention": {  # fields of ot_attention.SinkhornSpec, for the plan and Sinkhorn self-attention
                "kind": "sinkhorn",  # of the self-attention; or "sparse_sinkhorn", "local", "softmax"
                "epsilon": 1.0,  # entropic temperature
                "base_steps": 20,  # without gradient
                "tail_steps": 2,  # differentiated
                "band": 64,  # residues to either side of the scaled diagonal; 0 for it alone, -1 for all
                "dustbin": "none",  # or "unit", "full"
                "gradient": "tail",  # or "implicit", "unrolled"
                "solver": "sinkhorn",  # or "newton"
                "newton_steps": 2,
                "cg_steps": 8,  # of a Newton step and of the implicit gradient
                "tau_a": 1.0,  # relaxation of row sums: 1 for sums that are met, 0 for free ones
                "tau_b": 1.0,  # the same of column sums; (1, 0) is softmax attention
                "tolerance": 0.0,  # movement in a base step below which these end early; 0 for never
            },
            "sparse": {  # fields of ot_attention.sparse.SparseSpec, for self-attention of kind sparse_sinkhorn or local
                "block": 32,  # residues
                "steps": 7,  # of balancing
                "temperature": 0.75,  # of the sorting scores
                "sortcut": 0,  # sorted blocks to attend to; 0 for the sorted and the own block
                "mixture": False,  # add dense softmax attention
            },
            "loss": {  # weights of the terms, and mask_rate
                "reconstruction": 1.0,
                "sparse_ce": 0.0,  # of the plan at the reference alignment
                "mask_rate": 0.15,  # share of the residues of x that are masked in training
            },
            "optimizer": {  # AdamW with linear warm-up and cosine decay
                "learning_rate": 2e-3,  # largest
                "warmup_steps": 50,
                "final_fraction": 0.02,  # of the learning rate, at the last step
                "weight_decay": 1e-3,
                "clip_norm": 1.0,  # of the gradient; 0 for no clipping
                "ema": 0.99,  # decay of the moving average of the parameters, which is evaluated
                "accumulate": 1,  # parts of a batch, computed one after the other
            },
            "mesh": {  # devices of all processes
                "data": -1,  # groups of devices that share a batch; -1 for as many as there are
                "model": 1,  # devices of a group, which share matrices and heads
                "sequence": 1,  # devices that share the places of a sequence, in task masked_residues
            },
            "train": {  # at a loss or gradient that is not finite
                "on_nonfinite": "stop",  # or "skip" the update, or "rollback" to a checkpoint and on behind the batch
                "max_nonfinite": 10,  # most steps of a run to skip or roll back
            },
            "checkpoint": {
                "every": 100,  # steps; 0 for the first and the last alone
                "keep": 2,  # latest checkpoints; -1 for all
                "keep_every": 0,  # steps whose multiples are kept for good; 0 for none
            },
            "log": {
                "every": 10,  # steps between lines of metrics.jsonl; 0 for none
                "eval_every": 200,  # steps between evaluations; 0 for none
                "eval_splits": ("validation",),  # that are evaluated; any that eval.py scores, but "test"
                "eval_pairs": 256,  # of each of these splits; -1 for all
                "trace": 0,  # first of three steps to trace into <workdir>/trace; 0 for none
                "wandb": "offline",  # "offline", "online" (needs an account) or "disabled"
            },
        }
    )
