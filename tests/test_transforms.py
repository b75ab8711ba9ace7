import numpy as np
import pytest

from data import transforms, vocab


def rows(*texts: str) -> np.ndarray:
    return np.array([list(text.encode()) for text in texts], np.uint8)


def test_pair_reads_shared_columns_of_either_case_and_both_gap_symbols():
    pair = transforms.pair(rows("......", "A-cDX.", "AR.dxW"), 1, 2)
    assert vocab.decode(pair.x) == "ACDX"
    assert vocab.decode(pair.y) == "ARDXW"
    np.testing.assert_array_equal(pair.target, [0, -1, 2, 3])
    np.testing.assert_array_equal(transforms.aligned_pairs(pair.target), [[0, 0], [2, 2], [3, 3]])


def test_swapped_rows_give_the_transposed_alignment():
    alignment = rows("AR-DN.CQ", "-RND-CCQ")
    forward = transforms.aligned_pairs(transforms.pair(alignment, 0, 1).target)
    backward = transforms.aligned_pairs(transforms.pair(alignment, 1, 0).target)
    np.testing.assert_array_equal(forward, backward[:, ::-1])


def test_targets_are_the_same_residues_of_the_same_columns():
    rng = np.random.default_rng(0)
    alignment = rng.choice(np.frombuffer(b"ACDEwyX.-", np.uint8), (2, 400))
    pair = transforms.pair(alignment, 0, 1)
    columns = [c for c in range(400) if all(alignment[r, c] not in b".-" for r in (0, 1))]
    expected = [[sum(alignment[r, k] not in b".-" for k in range(c)) for r in (0, 1)] for c in columns]
    np.testing.assert_array_equal(transforms.aligned_pairs(pair.target), expected)


def test_rows_without_a_shared_column_have_no_target_and_no_identity():
    pair = transforms.pair(rows("AR--", "--DN"), 0, 1)
    np.testing.assert_array_equal(pair.target, [-1, -1])
    assert np.isnan(transforms.pair_identity(pair))
    assert transforms.aligned_pairs(pair.target).shape == (0, 2)


def test_identity_counts_aligned_residues_only_and_x_equals_nothing():
    # columns A/A (same), R/D (not), x/X (not, unknown), w/W (same); C and Q stand alone
    pair = transforms.pair(rows("ARxwC-", "ADXW-Q"), 0, 1)
    assert transforms.pair_identity(pair) == 0.5


def test_a_row_outside_the_alignment_is_refused_by_name():
    with pytest.raises(ValueError, match=r"j: row 2 was given, the alignment has rows 0\.\.1"):
        transforms.pair(rows("AR", "AR"), 0, 2)
    with pytest.raises(ValueError, match="i: row -1"):
        transforms.pair(rows("AR", "AR"), -1, 0)


def test_a_symbol_that_is_no_residue_is_refused():
    with pytest.raises(ValueError, match=r"symbol '\*' is no residue and no gap"):
        transforms.pair(rows("A*", "AR"), 0, 1)


def test_a_crop_keeps_the_alignment_of_what_is_left():
    rng = np.random.default_rng(0)
    whole = transforms.pair(rng.choice(np.frombuffer(b"ACDEFGHIKL--", np.uint8), (2, 60)), 0, 1)
    for draws in np.random.default_rng(1).random((40, 3)):
        cropped = transforms.crop(whole, draws)
        sequences = [(whole.x, cropped.x), (whole.y, cropped.y)]
        cut, kept = sequences if draws[0] < 0.5 else sequences[::-1]
        lost = int(draws[2] * len(cut[0]) / 2)
        offset = lost if draws[1] < 0.5 else 0
        np.testing.assert_array_equal(cut[1], cut[0][offset : len(cut[0]) - lost + offset])
        np.testing.assert_array_equal(*kept)
        x_offset, y_offset = (offset, 0) if draws[0] < 0.5 else (0, offset)
        expected = transforms.aligned_pairs(whole.target) - (x_offset, y_offset)
        inside = ((expected >= 0) & (expected < (len(cropped.x), len(cropped.y)))).all(axis=1)
        np.testing.assert_array_equal(transforms.aligned_pairs(cropped.target), expected[inside])
        assert inside.any()


def test_a_crop_that_would_leave_nothing_aligned_is_not_made():
    whole = transforms.pair(rows("A---", "ARDN"), 0, 1)
    assert transforms.crop(whole, np.array([0.9, 0.1, 0.9])) is whole  # y without its start
    assert len(transforms.crop(whole, np.array([0.9, 0.9, 0.9])).y) == 3


def test_vocabulary_round_trip_and_sizes():
    tokens = vocab.encode(vocab.RESIDUES.encode() + vocab.RESIDUES.lower().encode())
    np.testing.assert_array_equal(tokens, [*range(1, 21)] * 2)
    np.testing.assert_array_equal(vocab.encode(b"BJOUXZbjouxz"), [vocab.X] * 12)
    assert vocab.decode(np.arange(vocab.SIZE)) == "?" + vocab.RESIDUES + "X?"
    with pytest.raises(ValueError, match=r"allowed are 0\.\.22"):
        vocab.decode(np.array([vocab.SIZE]))
