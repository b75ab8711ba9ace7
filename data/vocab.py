"""Residue tokens: 0 is padding, 1..20 the amino acids, 21 any other residue, 22 the mask.

The amino acids stand in the order of the BLOSUM matrices, so row n of a substitution matrix belongs to token n + 1.
"""

from collections import Counter
from string import ascii_uppercase

import numpy as np
import parasail
from jaxtyping import Int, Int32, UInt8

PAD = 0
RESIDUES = "ARNDCQEGHILKMFPSTWYV"
X = 21
MASK = 22
SIZE = 23

AMBIGUOUS = "BJOUXZ"  # codes for ambiguous, rare (U selenocysteine, O pyrrolysine) or unknown residues: all become X
GAPS = b"-.~_"  # HMMER and Easel write '~' for missing data, and read '_' as a gap
# Gap penalties used with BLOSUM62, in half bits: of the first residue of a gap, and of each further one.
FIRST_GAP, FURTHER_GAP = 11, 1

_NUCLEOTIDES = "ACGTUN"
_IUPAC_NUCLEOTIDES = _NUCLEOTIDES + "RYKMSWBDHV"

_INVALID = 255
_LETTERS = "?" + RESIDUES + "X?"  # by token; padding and mask have no letter of their own


_TOKENS = np.full(256, _INVALID, np.uint8)
for _token, _letters in [*enumerate(RESIDUES, start=1), (X, AMBIGUOUS)]:
    _TOKENS[list((_letters + _letters.lower()).encode())] = _token


def is_residue(symbols: UInt8[np.ndarray, "*shape"]) -> np.ndarray:
    """Mask the ASCII symbols that are residues, in either case, ambiguity codes included."""
    return _TOKENS[symbols] != _INVALID


def can_be_aligned(symbols: UInt8[np.ndarray, "*shape"], insert_states: bool = False) -> np.ndarray:
    """Mask the ASCII symbols that may be aligned with others of their column: residues, in either case.

    With `insert_states`, lower-case residues are insert states of a profile HMM, which are aligned with nothing.
    """
    residues = is_residue(symbols)
    return residues & (symbols < ord("a")) if insert_states else residues


def count_letters(symbols: UInt8[np.ndarray, "*shape"]) -> Counter[str]:
    """Count the letters of ASCII symbols, as upper case."""
    counts = np.bincount(symbols.ravel(), minlength=256)
    return Counter({letter: int(counts[ord(letter)] + counts[ord(letter.lower())]) for letter in ascii_uppercase})


def seem_nucleotides(letters: Counter[str]) -> bool:
    """Say whether the letters of a sequence or a family are DNA or RNA.

    A, C, G, T and N are amino acids too. So there must be 20 letters, A, C, G and T or U among them, and at most 5 %
    others; more ambiguity codes of IUPAC if there is nothing else. U is rare in proteins: 8 letters are enough with it.
    """
    total = letters.total() - letters["X"]
    has_all = all(_sum(letters, base) for base in ("A", "C", "G", "TU"))
    is_rna = total >= 8 and letters["U"] >= 0.05 * total
    return may_be_nucleotides(letters) and (is_rna or (has_all and total >= 20))


def may_be_nucleotides(letters: Counter[str]) -> bool:
    """Say whether DNA or RNA may have these letters, however few they are."""
    total = letters.total() - letters["X"]
    nucleotides = _sum(letters, _NUCLEOTIDES)
    iupac_alone = _sum(letters, _IUPAC_NUCLEOTIDES) == total and nucleotides >= 0.75 * total
    return nucleotides >= 0.95 * total or iupac_alone


def _sum(letters: Counter[str], chosen: str) -> int:
    return sum(letters[letter] for letter in chosen)


def encode(sequence: UInt8[np.ndarray, " length"] | bytes) -> Int32[np.ndarray, " length"]:
    """Return the tokens of an ungapped ASCII sequence in either case.

    Raises ValueError for a symbol that is no residue (gaps, '*', digits).
    """
    symbols = np.frombuffer(sequence, np.uint8) if isinstance(sequence, bytes) else sequence
    tokens = _TOKENS[symbols]
    bad = np.flatnonzero(tokens == _INVALID)
    if bad.size:
        raise ValueError(
            f"sequence: symbol {chr(symbols[bad[0]])!r} at position {bad[0]} is no residue; allowed are the letters "
            f"{RESIDUES + AMBIGUOUS} in either case: remove gaps and other symbols before encoding"
        )
    return tokens.astype(np.int32)


def decode(tokens: Int[np.ndarray, " length"]) -> str:
    """Return the upper-case letters of tokens 1..21, and '?' for padding and mask; ValueError for other tokens."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= SIZE):
        raise ValueError(f"tokens: values {tokens.min()}..{tokens.max()} were given, allowed are 0..{SIZE - 1}")
    return "".join(_LETTERS[token] for token in tokens)


def blosum62() -> Int32[np.ndarray, "23 23"]:
    """Return the scores of token pairs in half bits; 0 where one is padding, mask or X."""
    scores = np.zeros((SIZE, SIZE), np.int32)
    scores[1:21, 1:21] = parasail.blosum62.matrix[:20, :20]  # the same twenty in the same order
    return scores
