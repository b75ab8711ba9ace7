"""TODO"""

from configs import base


def get_config():
    config = base.get_config()
    config.attention.tail_steps = 1
    config.attention.dustbin = "none"
    return config
