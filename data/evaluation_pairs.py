"""Fixed evaluation pairs of a split, in batches that lose no pair."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from data.batches import Batch, PairId, PairReader, assemble, by_length
from data.index import Families, readable, row_lengths
from data.sampling import check_buckets
from data.transforms import Pair
from data.variants import FLANKED, NEGATIVES, PLAIN, FlankedReader, SplitRows, flanks, negative

Ids = Int64[np.ndarray, "pairs 4"]
PairLengths = Int64[np.ndarray, " pairs"]
VARIANTS = PLAIN, FLANKED, NEGATIVES


def evaluation_batches(
    families: Families,
    batch_size: int,
    buckets: Sequence[int],
    *,
    variant: str = PLAIN,
    limit: int | None = None,
    divisible_by: int = 1,
    max_bad: int = 0,
) -> Iterator[Batch]:
    """Return the fixed evaluation pairs of a split in batches, each pair once, as `batches.by_length` divides them.

    `variant`: "flanked" adds unrelated residues at ends of these pairs, "negatives" has an unrelated sequence in the
    place of y (data/variants.py). A flanked pair keeps the id of its pair.

    `limit` is the most pairs, for a quick look while training: the same ones every time and in every variant, spread
    over the families, and only pairs that fit into the given buckets, as every further shape is compiled.
    `divisible_by` divides every batch size, for example the number of devices. `max_bad` damaged records may be left
    out, with a warning for each.

    Raises BadRecordError for more of them, and ValueError: no family or no evaluation pair in the split (with limit:
    none that fits), a variant of a split with one clan alone, an unknown variant, limit below 1, batch_size not
    divisible by divisible_by.
    """
    check_buckets(buckets)
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant!r} was given, allowed are {', '.join(VARIANTS)}")
    if not 1 <= divisible_by <= batch_size or batch_size % divisible_by:
        raise ValueError(f"divisible_by: {divisible_by} was given, allowed are divisors of batch_size = {batch_size}")
    ids, rows = _evaluation_pairs(families, max_bad)
    if limit is not None:
        ids = ids[_spread(ids, _longer(ids, rows) <= buckets[-1], limit)]
    ids, lengths, read = _of_variant(variant, ids, rows, families)
    parts = list(by_length(ids, lengths, buckets, batch_size, divisible_by))
    return (assemble([read(*i) for i in part.tolist()], part, length) for part, length in parts)


def _evaluation_pairs(families: Families, max_bad: int) -> tuple[Ids, SplitRows]:
    """Return the ids of all evaluation pairs, family after family, and the lengths of all rows."""
    ids, names, lengths = [np.zeros((0, 4), np.int64)], [], []
    bad: list[str] = []
    for f, family in enumerate(readable(families, max_bad, bad)):
        names.append(("", "") if family is None else (family.accession, family.unit))
        lengths.append(np.zeros(0, np.int64) if family is None else row_lengths(family))
        if family is not None:
            i, j = family.pairs.astype(np.int64).T
            ids.append(np.stack([np.full_like(i, f), i, np.full_like(j, f), j], axis=1))
    for message in bad:
        warnings.warn(f"left out: {message}", stacklevel=3)
    if not any(map(len, ids)):
        raise ValueError(
            f"families: none of the {len(families)} families of this split has evaluation pairs; "
            "evaluate on 'validation', 'test_iid' or 'test_ood', or on data with more families"
        )
    parts = [number for number, part in enumerate(getattr(families, "parts", [families])) for _ in range(len(part))]
    return np.concatenate(ids), SplitRows([name for name, _ in names], [unit for _, unit in names], lengths, parts)


def _of_variant(
    variant: str, ids: Ids, rows: SplitRows, families: Families
) -> tuple[Ids, PairLengths, Callable[..., Pair]]:
    """Return the ids of a variant, the length of each pair's longer sequence, and a reader of these pairs."""
    if variant == PLAIN:
        return ids, _longer(ids, rows), PairReader(families)
    rows.check_units(variant)
    if variant == NEGATIVES:
        ids = np.array([negative(rows, pair_id) for pair_id in _tuples(ids)], np.int64)
        return ids, _longer(ids, rows), PairReader(families)
    ends = {pair_id: flanks(rows, pair_id) for pair_id in _tuples(ids)}
    added = [[sum(end.length for end in of if end) for of in (each[:2], each[2:])] for each in ends.values()]
    return ids, _longer(ids, rows, np.array(added)), FlankedReader(families, ends)


def _tuples(ids: Ids) -> Iterator[PairId]:
    return ((f, i, g, j) for f, i, g, j in ids.tolist())


def _longer(ids: Ids, rows: SplitRows, added: Int64[np.ndarray, "pairs 2"] | int = 0) -> PairLengths:
    """Return the length of each pair's longer sequence, with residues that are added to x and to y."""
    lengths = [[rows.length(f, i), rows.length(g, j)] for f, i, g, j in _tuples(ids)]
    return (np.array(lengths, np.int64).reshape(-1, 2) + added).max(axis=1)


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
