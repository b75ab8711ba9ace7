"""sort_sinkhorn with dense softmax attention, the yardstick.

python train.py --config=configs/sort_softmax.py
python eval.py --workdir=runs/sort_softmax
"""

from ml_collections import ConfigDict

from configs import sort_sinkhorn


def get_config() -> ConfigDict:
    config = sort_sinkhorn.get_config()
    config.attention.kind = "softmax"
    return config
