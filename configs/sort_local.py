"""sort_sinkhorn with attention to the own block alone.

python train.py --config=configs/sort_local.py
python eval.py --workdir=runs/sort_local
"""

from ml_collections import ConfigDict

from configs import sort_sinkhorn


def get_config() -> ConfigDict:
    config = sort_sinkhorn.get_config()
    config.attention.kind = "local"
    return config
