"""What all configurations share. Start one of the others: `python train.py --config=configs/r2_balanced.py`."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "total_steps": 600,
            "batch_size": 32,
            "seed": 0,
            "data": {
                "dir": "data/default",  # relative to the repository; shards made by scripts/build_pfam.py
                "buckets": (64, 128, 192, 256, 384),  # padded lengths; longer pairs are left out of training
                "pairs_per_family": 100,  # a family counts as many times as it has pairs, at most this often
                "crop": 0.0,  # share of pairs of which one sequence loses up to half at one end
                "workers": 0,  # processes that prepare batches; 0 for a thread
                "prefetch": 4,
                "max_bad_records": 0,  # damaged records that may be left out of a split
            },
            "model": {
                "width": 128,
                "depth": 6,
                "kernel": 5,
                "dilations": 4,
                "heads": 4,
                "attention_every": 3,
                "plan_width": 64,
                "plan_gain": 1.0,  # of the projection to queries and keys before training
                "value_width": 64,
                "substitution_prior": False,
                "positions": True,  # the plan's scores know length-scaled positions
                "refinement": 0,  # convolution blocks that weigh a first plan's votes for a second one; 0 for none
                "gap_model": False,  # learn the pair HMM that plans are aligned by; see loss.alignment
                "implementation": "auto",  # of the attention: or "reference", "xla", "pallas_tpu"
                "dtype": "float32",
            },
            "attention": {  # the fields of ot_attention.SinkhornSpec, of the plan and the encoder's self-attention
                "kind": "sinkhorn",  # of the self-attention: or "sparse_sinkhorn", "local", "softmax"
                "epsilon": 1.0,
                "base_steps": 20,
                "tail_steps": 2,
                "band": 64,  # residues to either side of the diagonal; -1 for all
                "dustbin": "none",
                "gradient": "tail",
                "solver": "sinkhorn",
                "newton_steps": 2,
                "cg_steps": 8,
            },
            "sparse": {  # of the self-attention, if it is sparse_sinkhorn or local: ot_attention/sparse.py
                "block": 32,  # residues
                "steps": 7,  # of balancing
                "temperature": 0.75,
                "sortcut": 0,  # attend to the first so many sorted blocks only; 0 for the sorted and the own one
                "mixture": False,  # with dense softmax attention
            },
            "loss": {
                "reconstruction": 1.0,
                "sparse_ce": 0.0,
                "alignment": 0.0,  # likelihood of the whole reference alignment; needs model.gap_model
                "mask_rate": 0.15,
            },
            "optimizer": {
                "learning_rate": 2e-3,
                "warmup_steps": 50,
                "final_fraction": 0.02,
                "weight_decay": 1e-3,
                "clip_norm": 1.0,
                "ema": 0.99,
                "accumulate": 1,
            },
            "mesh": {  # over all processes
                "data": -1,  # groups that share a batch; -1 for all there are
                "model": 1,  # devices of a group, which share its matrices and heads
            },
            "train": {
                "on_nonfinite": "stop",  # at a loss or gradient that is not finite: or "skip", "rollback"
                "max_nonfinite": 10,  # so often in a run, then it stops
            },
            "checkpoint": {"every": 100, "keep": 2, "keep_every": 0},
            "log": {
                "every": 10,  # steps between lines of metrics.jsonl
                "eval_every": 200,  # steps between evaluations on the validation split; 0 for none
                "eval_pairs": 256,
                "trace": 0,  # step from which on three are traced into <workdir>/trace; 0 for none
                "wandb": "offline",  # "offline", "online" (needs an account) or "disabled"
            },
        }
    )
