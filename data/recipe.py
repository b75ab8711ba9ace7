"""What a build reads, and which of the records it reads it keeps; shared by the plain and by the Beam build."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data import stockholm
from data.families import PAIRS_PER_FAMILY, Family, from_alignment, limit_rows, split_records
from data.stockholm import StockholmError

RELEASES = "https://ftp.ebi.ac.uk/pub/databases/Pfam/releases"
Place = tuple[int, int]  # the number of the input, and of the record in it


@dataclass(frozen=True)
class Recipe:
    """What a build is made of: local `inputs` and `clans`, or a Pfam `release` such as "37.0", fetched from `mirror`.

    `skip_bad` leaves malformed families out and lists them; `max_rows` keeps that many rows a family; `num_shards` is
    that of every split, by default it follows from the size. `pairs` evaluation pairs are drawn of a family at most.
    `evaluation_only` is for alignments to be measured on and never trained on: all go to `test_ood`, without clans.
    """

    inputs: tuple[str, ...] = ()
    clans: str = ""
    release: str = ""
    mirror: str = RELEASES
    skip_bad: bool = False
    max_rows: int | None = None
    max_family_bytes: int = stockholm.MAX_FAMILY_BYTES
    num_shards: int | None = None
    evaluation_only: bool = False
    pairs: int = PAIRS_PER_FAMILY

    def __post_init__(self):
        if bool(self.release) == bool(self.inputs):
            raise ValueError(f"give either a release or inputs, not {'both' if self.release else 'neither'}")
        if self.inputs and not (self.clans or self.evaluation_only):
            raise ValueError(
                "inputs need clans (Pfam-A.clans.tsv[.gz]): without them homologous families would be split apart; "
                "only data for evaluation alone (evaluation_only, --evaluation-only) do without"
            )
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs}: at least 1 evaluation pair a family")
        if self.max_rows is not None and self.max_rows < 2:
            raise ValueError(f"max_rows={self.max_rows}: at least 2, a family of one row has no pairs")

    def records(self, family: Family) -> Iterator[tuple[str, Family]]:
        """The (split, record) that one family gives."""
        return split_records(family, evaluation_only=self.evaluation_only, pairs=self.pairs)


@dataclass
class Report:
    """What a build did: records a split, malformed families skipped, well-formed ones dropped, each with the reason."""

    records: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A record that stands for its accession, with the splits it would give records to."""

    place: Place
    path: str
    accession: str
    rows: int
    splits: tuple[str, ...]


def candidate(place: Place, path: str, family: Family, recipe: Recipe) -> Candidate:
    splits = tuple(split for split, _ in recipe.records(family))
    return Candidate(place, path, family.accession, len(family.rows), splits)


def choose(candidates: list[Candidate]) -> tuple[Candidate | None, list[str]]:
    """Of several records of one accession the one with most rows, the first among equals; why others are left out."""
    left_out = [f"{c.accession} of {c.path}: no two rows with an aligned residue" for c in candidates if not c.splits]
    usable = sorted((c for c in candidates if c.splits), key=lambda c: (-c.rows, c.place))
    if not usable:
        return None, left_out
    best = usable[0]
    left_out += [f"{c.accession} of {c.path}: {c.rows} rows, that of {best.path} has {best.rows}" for c in usable[1:]]
    return best, left_out


def read_inputs(
    inputs: tuple[str, ...], clans: dict[str, str], recipe: Recipe, skipped: Callable[[str], object]
) -> Iterator[tuple[Place, Family]]:
    """Every well-formed family with its place."""
    for i, path in enumerate(inputs):
        for j, family in enumerate(read_families(path, clans, recipe, skipped)):
            yield (i, j), family


def read_families(
    path: str, clans: dict[str, str], recipe: Recipe, skipped: Callable[[str], object]
) -> Iterator[Family]:
    """The families of one file as the recipe wants them; a malformed one raises StockholmError or goes to `skipped`."""

    def on_bad(error: StockholmError) -> None:
        skipped(str(error))

    bad = on_bad if recipe.skip_bad else None
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
