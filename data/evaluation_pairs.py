"""Fixed evaluation pairs of a split, in batches that lose no pair."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from data.batches import Batch, PairReader, assemble
from data.index import Families, readable, row_lengths
from data.sampling import check_buckets

Ids = Int64[np.ndarray, "pairs 4"]
PairLengths = Int64[np.ndarray, " pairs"]


def evaluation_batches(
    families: Families,
    batch_size: int,
    buckets: Sequence[int],
    *,
    limit: int | None = None,
    divisible_by: int = 1,
    max_bad: int = 0,
) -> Iterator[Batch]:
    """Return the fixed evaluation pairs of a split in batches, each pair once, shortest bucket first.

    No pair is dropped: the largest bucket is doubled until the longest pair fits. With every doubling the batch is
    halved, so that its memory stays the same. The last batch of a bucket is filled up with empty examples (id -1), so
    that a bucket is one compiled shape.

    `limit` is the most pairs, for a quick look while training: the same ones every time, spread over the families, and
    only pairs that fit into the given buckets, as every further shape is compiled. `divisible_by` divides every batch
    size, for example the number of devices. `max_bad` damaged records may be left out, with a warning for each.

    Raises BadRecordError for more of them, and ValueError: no family or no evaluation pair in the split (with limit:
    none that fits), limit below 1, batch_size not divisible by divisible_by.
    """
    check_buckets(buckets)
    if not 1 <= divisible_by <= batch_size or batch_size % divisible_by:
        raise ValueError(f"divisible_by: {divisible_by} was given, allowed are divisors of batch_size = {batch_size}")
    ids, lengths = _evaluation_pairs(families, max_bad)
    if limit is not None:
        chosen = _spread(ids, lengths <= buckets[-1], limit)
        ids, lengths = ids[chosen], lengths[chosen]
    parts = []
    for length, size in _evaluation_shapes(buckets, int(lengths.max()), batch_size, divisible_by):
        fits = lengths <= length
        filled_up = np.pad(ids[fits], ((0, -fits.sum() % size), (0, 0)), constant_values=-1)
        parts += [(part, length) for part in filled_up.reshape(-1, size, 4)]
        ids, lengths = ids[~fits], lengths[~fits]
    read = PairReader(families)
    return (assemble([read(*i) for i in part.tolist()], part, length) for part, length in parts)


def _evaluation_pairs(families: Families, max_bad: int) -> tuple[Ids, PairLengths]:
    """Return the ids of all evaluation pairs, family after family, and the length of each pair's longer sequence."""
    ids, lengths = [np.zeros((0, 4), np.int64)], [np.zeros(0, np.int64)]
    bad: list[str] = []
    for f, family in enumerate(readable(families, max_bad, bad)):
        if family is not None:
            i, j = family.pairs.astype(np.int64).T
            ids.append(np.stack([np.full_like(i, f), i, np.full_like(j, f), j], axis=1))
            lengths.append(row_lengths(family)[family.pairs].max(axis=1, initial=0))
    for message in bad:
        warnings.warn(f"left out: {message}", stacklevel=3)
    if not any(map(len, ids)):
        raise ValueError(
            f"families: none of the {len(families)} families of this split has evaluation pairs; "
            "evaluate on 'validation', 'test_iid' or 'test_ood', or on data with more families"
        )
    return np.concatenate(ids), np.concatenate(lengths)


def _spread(ids: Ids, allowed: Bool[np.ndarray, " pairs"], limit: int) -> Int64[np.ndarray, " chosen"]:
    """Choose `limit` pairs: a random one of every family, then a second one of every family, and so on."""
    if limit < 1:
        raise ValueError(f"limit: {limit} was given, allowed is 1 or more, or None for all pairs")
    if not allowed.any():
        raise ValueError(f"limit: none of the {len(ids)} evaluation pairs fits the largest bucket; give larger buckets")
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(np.flatnonzero(allowed))
    shuffled = shuffled[np.argsort(ids[shuffled, 0], kind="stable")]
    _, first, count = np.unique(ids[shuffled, 0], return_index=True, return_counts=True)
    turn = np.arange(len(shuffled)) - np.repeat(first, count)
    return np.sort(shuffled[np.lexsort((rng.random(len(turn)), turn))[:limit]])


def _evaluation_shapes(buckets: Sequence[int], longest: int, batch_size: int, divisor: int) -> Iterator[tuple]:
    """Yield length and batch size of every bucket, up to one that holds `longest`."""
    yield from ((length, batch_size) for length in buckets)
    length = buckets[-1]
    while length < longest:
        length *= 2
        batch_size = batch_size if batch_size % (2 * divisor) else batch_size // 2
        yield length, batch_size
