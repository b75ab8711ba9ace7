"""Settings of a run that belong to no part of its model: its size, its checkpoints and its log."""

import dataclasses
from typing import Annotated, ClassVar

from data.settings import BATCH_SIZE, MOST, SEED, Choice, Choices, Integer, Section
from data.variants import EVALUATION_SETS


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """Keys outside of all sections, which configs/base.py describes."""

    task: Annotated[str, Choice(("alignment", "pair_hmm", "sorting", "masked_residues"))] = "alignment"
    total_steps: Annotated[int, Integer(1, MOST - 1)] = 600
    batch_size: Annotated[int, BATCH_SIZE] = 32
    seed: Annotated[int, SEED] = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """`config.checkpoint`, which configs/base.py describes."""

    name: ClassVar[str] = "checkpoint"

    every: Annotated[int, Integer()] = 100
    keep: Annotated[int, Integer(1, or_all=True)] = 2
    keep_every: Annotated[int, Integer()] = 0


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """`config.log`, which configs/base.py describes."""

    name: ClassVar[str] = "log"

    every: Annotated[int, Integer()] = 10
    eval_every: Annotated[int, Integer()] = 200
    eval_pairs: Annotated[int, Integer(1, or_all=True, hint="; log.eval_every=0 evaluates nothing")] = 256
    eval_splits: Annotated[tuple[str, ...], Choices(tuple(EVALUATION_SETS))] = ("validation",)
    trace: Annotated[int, Integer()] = 0
    wandb: Annotated[str, Choice(("offline", "online", "disabled"))] = "offline"
