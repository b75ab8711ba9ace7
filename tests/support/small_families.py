"""Families of known lengths, a pipeline of them, and what its batches must hold."""

import itertools

import numpy as np

from data.batches import unbatch
from data.families import Family
from data.pipeline import PipelineConfig
from data.transforms import NO_TARGET, pair
from data.vocab import RESIDUES

CONFIG = PipelineConfig(buckets=(16, 32, 64), batch_size=8, seed=3, pairs_per_family=50)


def make_family(accession: str, lengths: list[int], pairs: int = 0) -> Family:
    """Rows with the given numbers of residues, gaps anywhere; the first `pairs` pairs of rows are evaluation pairs."""
    rng = np.random.default_rng(list(accession.encode()))
    alignment = np.full((len(lengths), max(lengths) + 4), ord("-"), np.uint8)
    for row, length in zip(alignment, lengths, strict=True):
        columns = rng.choice(row.size, length, replace=False)
        row[columns] = rng.choice(np.frombuffer(RESIDUES.encode(), np.uint8), length)
    rows = tuple(f"{accession}/{i}" for i in range(len(lengths)))
    chosen = list(itertools.islice(itertools.combinations(range(len(lengths)), 2), pairs))
    return Family(accession, accession, "", rows, alignment, np.array(chosen, np.int32).reshape(-1, 2))


FAMILIES = [
    make_family("short", [8, 9, 10, 11, 12, 13], pairs=15),
    make_family("mixed", [0, 10, 14, 16, 17, 30, 31, 33, 50, 64, 65, 90], pairs=15),
    make_family("alone", [20]),
    make_family("longer", [40, 41, 42, 43, 44], pairs=7),
    make_family("pair", [24, 60], pairs=1),
]


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def check_examples(batch, families):
    """Every row of a batch is the pair its id names, padded; every row without id is empty."""
    pairs = dict(zip(np.flatnonzero(batch["id"][:, 0] >= 0).tolist(), unbatch(batch), strict=True))
    for n in range(len(batch["id"])):
        if n in pairs:
            (family, i, other, j), got = pairs[n]
            expected = pair(families[family].alignment, i, j)
            for name in ("x", "y", "target"):
                np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
            assert i != j and family == other
        assert not batch["x"][n, batch["x_length"][n] :].any()
        assert not batch["y"][n, batch["y_length"][n] :].any()
        assert (batch["target"][n, batch["x_length"][n] :] == NO_TARGET).all()
        assert n in pairs or (batch["x_length"][n] == batch["y_length"][n] == 0 and (batch["id"][n] == -1).all())
