"""Train at one place of the dial from softmax attention to balanced transport: tau_a = tau_b, R = 2.

    python train.py --config=configs/dial.py:0.8 --config.data.dir=runs/pfam          # without a dustbin
    python train.py --config=configs/dial.py:0.8,full --config.data.dir=runs/pfam     # with one
    python train.py --config=configs/dial.py:softmax                                  # tau_a = 1, tau_b = 0

1 is balanced transport: `dial.py:1` is r2_balanced.py, and `dial.py:1,full` r2_dustbin.py.
"""

from configs import base


def get_config(place: str = "0.8") -> base.ConfigDict:
    """Return the configuration of a place: a number from 0 to 1 or "softmax", and behind a comma a dustbin's name."""
    tau, _, dustbin = place.partition(",")
    tau_a, tau_b = (1.0, 0.0) if tau == "softmax" else (_number(tau, place),) * 2
    settings = {"attention.tau_a": tau_a, "attention.tau_b": tau_b, "attention.dustbin": dustbin or "none"}
    return base.changed(base.get_config(), {"attention.tail_steps": 2, **settings})


def _number(tau: str, place: str) -> float:
    try:
        return float(tau)
    except ValueError as error:
        allowed = "a number from 0 to 1 or softmax, and perhaps a dustbin: 0.8, or softmax,full"
        raise ValueError(f"configs/dial.py:{place} must be {allowed}") from error
