"""The task of aligning pairs of rows of protein families; scored beside the baselines on the same pairs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from data import mixture, pipeline
from data.builds import NoSplitError
from data.evaluation_pairs import evaluation_batches
from data.families import BadRecordError
from data.index import Families
from data.settings import Folder
from data.variants import EVALUATION_SETS, NEGATIVES, PLAIN
from evaluation import baselines, figures, metrics, scoring
from evaluation.task import OF_ALL_TASKS, Options, Task, Validation, evaluated_at_once, limit_of, resolve_data_dir
from models.aligner import AlignerConfig
from models.attention import specs_of
from models.objectives import AlignmentObjective, LossConfig
from models.pair_aligner import PairAlignerConfig, PairLossConfig, PairObjective
from training import sharding
from training.state import Trainer, abstract_batch

if TYPE_CHECKING:
    from evaluation.runs import Run

_CERTIFIED = 128  # pairs of a split whose plans are certified


@dataclasses.dataclass(frozen=True)
class DataConfig(pipeline.PipelineConfig):
    """`config.data` of an aligner: one or several data sets, and the settings of the batches."""

    dir: Annotated[str, Folder(hint=", or several with weights: runs/a:1,runs/b:0.5")] = "data/default"


class AlignmentTask(Task):
    """Align pairs of rows of protein families; score beside the baselines on the same pairs."""

    splits = tuple(EVALUATION_SETS)
    purpose = "align"

    def batches(self, mesh: Mesh) -> pipeline.BatchIterator:
        shard_index, shard_count = sharding.host_shard(mesh)
        families = open_families(self.config.data.dir, "train")
        return pipeline.train_iterator(families, self.data(), shard_index=shard_index, shard_count=shard_count)

    def abstract_batch(self, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_batch(self.config.batch_size, length, mesh)

    def data(self) -> DataConfig:
        """Return the settings of the training batches."""
        return DataConfig.of({**self.config.data, "batch_size": self.config.batch_size, "seed": self.config.seed})

    def validation(self, trainer: Trainer, mesh: Mesh) -> Validation:
        splits, model = self._eval_splits(), scoring.pretrained(trainer, mesh)
        data_dir, limit = self.config.data.dir, limit_of(self.config)
        mixture.entries(data_dir)  # whose errors are not of `log.eval_splits`
        try:
            found = {name: self.open(data_dir, name, mesh) for name in splits}
            samples = {name: (families, list(map(list, batches(limit)))) for name, (families, batches) in found.items()}
        except BadRecordError:
            raise
        except ValueError as error:
            raise ValueError(f"log.eval_splits={tuple(splits)}: {error}") from error

        def score(params: PyTree, after_each: Callable[[], None]) -> dict[str, dict[str, dict]]:
            trained = dataclasses.replace(model, params=params)
            return {
                name: scoring.score_negatives(trained, families, *batches, done=lambda count: after_each())
                if EVALUATION_SETS[name].variant == NEGATIVES
                else scoring.score_split(trained, families, *batches, see=lambda example: after_each())
                for name, (families, batches) in samples.items()
            }

        return score

    def _scorer(self, run: "Run", options: Options) -> Callable[[str], dict[str, Any]]:
        pictures, limit = options.pictures, options.limit
        data_dir = options.data_dir or self.config.data.dir
        model = run.pretrained()
        certificates = run.trainer.compiled_evaluation(scoring.certifier(run.trainer), run.mesh)
        certify = functools.partial(certificates, run.params)
        pictures.mkdir(parents=True, exist_ok=True)

        def score(name: str) -> dict[str, Any]:
            families, batches = self.open(data_dir, name, run.mesh)
            if EVALUATION_SETS[name].variant == NEGATIVES:
                found: dict[str, Any] = {
                    "splits": scoring.score_negatives(model, families, *batches(limit), progress=name)
                }
            else:
                observer = scoring.Observer(name, pictures, options.examples)
                summaries = scoring.score_split(model, families, *batches(limit), see=observer, progress=name)
                found = {"splits": summaries}
                if tenths := observer.reliability.tenths():
                    found |= {"reliability": tenths, "calibration": metrics.calibration(tenths)}
                if not model.has_pair_hmm:
                    few = batches(min(limit or _CERTIFIED, _CERTIFIED))
                    found["certificates"] = scoring.certify_split(certify, *few)
            overall = {who: of["overall"] for who, of in found["splits"].items()}
            others = {who: of for who, of in overall.items() if who in baselines.BASELINES}
            figures.comparison_bars({"model": overall["model"]}, others, pictures / f"{name}.png", title=name)
            return found

        return score

    def open(self, data_dir: str, name: str, mesh: Mesh) -> tuple[Families, Callable[[int | None], list]]:
        """Open the families of an evaluation split; return them, and a function from a limit to the pairs to score.

        Negatives come behind the evaluation pairs that they are compared with. Raises ValueError or OSError as
        `open_families` does.
        """
        base, variant = EVALUATION_SETS[name]
        try:
            families = open_families(data_dir, base)
        except NoSplitError as error:
            if name == base:
                raise
            instead = "; or take test_ood_negatives" if name == "negatives" else ""
            raise ValueError(f"{name} is made of the families of {base}: {error}{instead}") from error
        needed = (PLAIN, NEGATIVES) if variant == NEGATIVES else (variant,)
        return families, lambda limit: [self._evaluation_batches(families, mesh, limit, of) for of in needed]

    def _evaluation_batches(self, families: Families, mesh: Mesh, limit: int | None, variant: str = PLAIN):
        data, devices = self.config.data, mesh.shape["data"]
        size = evaluated_at_once(self.config.batch_size, devices)
        max_bad = data.get("max_bad_records", 0)  # older runs have none
        options = {"variant": variant, "limit": limit, "divisible_by": devices, "max_bad": max_bad}
        return evaluation_batches(families, size, data.buckets, **options)


class PlanTask(AlignmentTask):
    """Align by a transport plan, trained to predict residues of x from what the plan sends, or its target entries."""

    sections = (*OF_ALL_TASKS, DataConfig, AlignerConfig, LossConfig)

    def objective(self) -> AlignmentObjective:
        spec, blocks = specs_of(self.config.to_dict())
        model, loss = AlignerConfig.of(self.config.model.to_dict()), LossConfig.of(self.config.loss.to_dict())
        return AlignmentObjective(model, spec, loss, blocks)


class PairTask(AlignmentTask):
    """Align by a pair HMM, trained on the likelihood of reference alignments."""

    sections = (*OF_ALL_TASKS, DataConfig, PairAlignerConfig, PairLossConfig)

    def objective(self) -> PairObjective:
        spec, blocks = specs_of(self.config.to_dict())
        model, loss = PairAlignerConfig.of(self.config.model.to_dict()), PairLossConfig.of(self.config.loss.to_dict())
        return PairObjective(model, blocks or spec, loss)


def open_families(data_dir: str, split: str) -> mixture.Mixture:
    """Open a split of the data sets that `data.dir` names, as `mixture.open_split` does."""
    return mixture.open_split(data_dir, split, resolve_data_dir)
