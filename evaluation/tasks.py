"""Tasks by name, and configurations with every key; train.py and eval.py never look at the kind of task themselves."""

from typing import Any

from ml_collections import ConfigDict

from evaluation.alignment import PairTask, PlanTask
from evaluation.masked import MaskedResiduesTask
from evaluation.sorting import SortingTask
from evaluation.task import Task


def task_of(config: ConfigDict) -> Task:
    """Make the task that a configuration names; alignment by a transport plan if it names none."""
    return _kind_of(config)(config)


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Add to the settings of a configuration the default of every key that is missing; values are not checked."""
    result = dict(settings)
    for section in _kind_of(settings).sections:
        if not section.name:
            result = section.defaults() | result
        elif isinstance(given := settings.get(section.name, {}), dict):
            result[section.name] = section.defaults() | given
    return result


def checked(config: ConfigDict) -> ConfigDict:
    """Return a configuration with every key, in plain values.

    Raises ValueError that names the key if there is no such key, or if its value is not allowed.
    """
    settings = completed(config.to_dict())
    sections = {section.name: section for section in _kind_of(settings).sections}
    run = sections.pop("").of({key: value for key, value in settings.items() if key not in sections})
    result = {key: getattr(run, key) for key in run.defaults()}
    for name, section in sections.items():
        own, shared = settings[name], {} if name != "data" else {key: result[key] for key in ("batch_size", "seed")}
        read = section.of(own | shared if isinstance(own, dict) else own)
        result[name] = {key: getattr(read, key) for key in section.defaults()}
    return ConfigDict(result)


def _kind_of(settings: Any) -> "type[Task]":
    kinds: dict[str, type[Task]] = {"pair_hmm": PairTask, "sorting": SortingTask, "masked_residues": MaskedResiduesTask}
    return kinds.get(str(settings.get("task")), PlanTask)  # another name is refused by RunConfig
