"""The task of the aligner: pairs of rows of protein families, aligned by the pair HMM."""

from evaluation.alignment import AlignmentTask, DataConfig
from evaluation.task import OF_ALL_TASKS
from models.attention import specs_of
from models.pair_aligner import PairAlignerConfig, PairLossConfig, PairObjective


class PairTask(AlignmentTask):
    sections = (*OF_ALL_TASKS, DataConfig, PairAlignerConfig, PairLossConfig)

    def objective(self) -> PairObjective:
        spec, blocks = specs_of(self.config.to_dict())
        model, loss = PairAlignerConfig.of(self.config.model.to_dict()), PairLossConfig.of(self.config.loss.to_dict())
        return PairObjective(model, blocks or spec, loss)
