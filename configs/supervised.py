"""TODO"""

from configs import r2_dustbin


def get_config():
    config = r2_dustbin.get_config()
    config.loss.sparse_ce = 1.0
    return config
