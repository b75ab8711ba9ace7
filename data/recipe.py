"""Input of a build and choice of the records to keep; shared by the plain and by the Beam build."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data import stockholm
from data.families import PAIRS_PER_FAMILY, Family, from_alignment, limit_rows, split_records
from data.stockholm import StockholmError

RELEASES = "https://ftp.ebi.ac.uk/pub/databases/Pfam/releases"
Place = tuple[int, int]  # the number of the input, and of the record in it
Skipped = Callable[[str], object]  # takes the message about a malformed family


@dataclass(frozen=True)
class Recipe:
    """Input and options of a build."""

    inputs: tuple[str, ...] = ()  # Stockholm files, plain or gzip
    clans: str = ""  # Pfam-A.clans.tsv, plain or gzip; needed with inputs unless evaluation_only
    release: str = ""  # Pfam release such as "37.0", downloaded from `mirror` in place of inputs and clans
    mirror: str = RELEASES
    skip_bad: bool = False  # list malformed families in the report instead of stopping at the first
    max_rows: int | None = None  # most rows a family
    max_family_bytes: int = stockholm.MAX_FAMILY_BYTES  # a larger family is malformed
    num_shards: int | None = None  # of every split; by default it follows from the size
    evaluation_only: bool = False  # put all families into test_ood, for alignments that are never trained on
    pairs: int = PAIRS_PER_FAMILY  # most evaluation pairs a family

    def __post_init__(self):
        if bool(self.release) == bool(self.inputs):
            raise ValueError(f"give either a release or inputs, not {'both' if self.release else 'neither'}")
        if self.inputs and not (self.clans or self.evaluation_only):
            raise ValueError(
                "inputs need clans (--clans Pfam-A.clans.tsv[.gz]): without them homologous families would be split "
                "apart; only data that are never trained on need none (evaluation_only, --evaluation-only)"
            )
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs}: at least 1 evaluation pair a family is needed")
        if self.max_rows is not None and self.max_rows < 2:
            raise ValueError(f"max_rows={self.max_rows}: at least 2 are needed, one row makes no pair")

    def records(self, family: Family) -> Iterator[tuple[str, Family]]:
        """Yield the (split, record) that one family gives."""
        return split_records(family, evaluation_only=self.evaluation_only, pairs=self.pairs)


@dataclass
class Report:
    """Result of a build: records a split; malformed families skipped and others dropped, each with the reason."""

    records: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A family of the input, without its sequences, and the splits to which it would give records."""

    place: Place
    path: str
    accession: str
    rows: int
    splits: tuple[str, ...]


def candidate(place: Place, path: str, family: Family, recipe: Recipe) -> Candidate:
    splits = tuple(split for split, _ in recipe.records(family))
    return Candidate(place, path, family.accession, len(family.rows), splits)


def choose(candidates: list[Candidate]) -> tuple[Candidate | None, list[str]]:
    """Choose among families of one accession the first with most rows; return it and why the others are left out."""
    left_out = [f"{c.accession} of {c.path}: no two rows with an aligned residue" for c in candidates if not c.splits]
    usable = sorted((c for c in candidates if c.splits), key=lambda c: (-c.rows, c.place))
    if not usable:
        return None, left_out
    best = usable[0]
    left_out += [f"{c.accession} of {c.path}: {c.rows} rows, but {best.path} has {best.rows}" for c in usable[1:]]
    return best, left_out


def read_inputs(
    inputs: tuple[str, ...], clans: dict[str, str], recipe: Recipe, skipped: Skipped
) -> Iterator[tuple[Place, Family]]:
    """Yield every well-formed family with its place."""
    for i, path in enumerate(inputs):
        for j, family in enumerate(read_families(path, clans, recipe, skipped)):
            yield (i, j), family


def read_families(path: str, clans: dict[str, str], recipe: Recipe, skipped: Skipped) -> Iterator[Family]:
    """Yield the families of one file, with at most `max_rows` rows.

    A malformed family, or one without name, raises StockholmError; with `skip_bad`, `skipped` gets the message.
    """
    bad = (lambda error: skipped(str(error))) if recipe.skip_bad else None
    for alignment in stockholm.read(path, max_family_bytes=recipe.max_family_bytes, on_bad=bad):
        try:
            family = from_alignment(alignment, clans)
        except ValueError as error:
            unnamed = StockholmError(path, alignment.line, "without name", str(error))
            if bad is None:
                raise unnamed from error
            bad(unnamed)
        else:
            yield limit_rows(family, recipe.max_rows)
