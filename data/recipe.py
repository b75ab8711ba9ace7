"""Input of a build and choice of the records to keep; shared by the plain and by the Beam build."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data import stockholm, vocab
from data.families import PAIRS_PER_FAMILY, SPLITS, Family, from_alignment, limit_rows, split_of, split_records
from data.files import STANDARD_STREAM, expanded
from data.insert_states import Decision, told_by_name
from data.insert_states import seem_present as seem_insert_states
from data.stockholm import StockholmError

RELEASES = "https://ftp.ebi.ac.uk/pub/databases/Pfam/releases"
Place = tuple[int, int]  # the number of the input, and of the record in it
Skipped = Callable[[str], object]  # takes the message about a malformed family
MAX_PAIRS = 1_000_000  # a family; drawn pairs are kept in memory


@dataclass(frozen=True)
class Recipe:
    """Input and options of a build."""

    inputs: tuple[str, ...] = ()  # Stockholm files, plain or compressed
    clans: str = ""  # Pfam-A.clans.tsv, plain or compressed; needed with inputs unless evaluation_only or every_family
    release: str = ""  # Pfam release such as "37.0", downloaded from `mirror` in place of inputs and clans
    mirror: str = RELEASES
    skip_bad: bool = False  # list malformed families in the report instead of stopping at the first
    max_rows: int | None = None  # most rows a family
    max_family_bytes: int = stockholm.MAX_FAMILY_BYTES  # a larger family is malformed
    num_shards: int | None = None  # of every split; by default it follows from the size
    evaluation_only: bool = False  # put all families into test_ood, for alignments that are never trained on
    every_family: bool = False  # put all families into train, part of their sequences into test_iid; without clans
    train_only: bool = False  # write no other split than train, as it would be with the others
    pairs: int = PAIRS_PER_FAMILY  # most evaluation pairs a family
    insert_states: bool | None = None  # lower case is never aligned, as in Pfam-A.full; None: the input decides

    def __post_init__(self):
        object.__setattr__(self, "inputs", tuple(map(expanded, self.inputs)))
        object.__setattr__(self, "clans", expanded(self.clans))
        if bool(self.release) == bool(self.inputs):
            raise ValueError(f"give either a release or inputs, not {'both' if self.release else 'neither'}")
        self._check_splits()
        if self.inputs and not (self.clans or self.evaluation_only or self.every_family):
            raise ValueError(
                "inputs need clans (--clans Pfam-A.clans.tsv[.gz]): without them homologous families would be split "
                "apart; only data that are never trained on need none (evaluation_only, --evaluation-only), and those "
                "of which all families are trained on (every_family, --every-family)"
            )
        if self.release and self.clans:
            raise ValueError(f"clans={self.clans} was given, but a release brings its own: leave one of them out")
        if STANDARD_STREAM in self.inputs:
            raise ValueError("inputs: '-' (standard input) cannot be read by the workers of a build: save it as a file")
        if not 1 <= self.pairs <= MAX_PAIRS:
            raise ValueError(f"pairs={self.pairs}: at least 1 evaluation pair a family is needed, at most {MAX_PAIRS}")
        if self.max_rows is not None and self.max_rows < 2:
            raise ValueError(f"max_rows={self.max_rows}: at least 2 are needed, one row makes no pair")
        if self.num_shards is not None and self.num_shards < 1:
            raise ValueError(
                f"num_shards={self.num_shards}: a split has at least 1; by default it follows from the size"
            )
        if self.max_family_bytes < 1:
            raise ValueError(f"max_family_bytes={self.max_family_bytes}: at least 1 is needed, to read any family")

    def _check_splits(self) -> None:
        """Raise ValueError if two options contradict each other about the split of a family."""
        told = "every_family (--every-family) puts all families into train"
        if self.every_family and self.evaluation_only:
            raise ValueError(f"{told}, evaluation_only (--evaluation-only) into test_ood: give one of them")
        if self.every_family and (self.clans or self.release):
            by = f"clans={self.clans}" if self.clans else f"release={self.release}"
            raise ValueError(f"{told}, and {by} divides them by clan: leave one of them out")
        if self.train_only and self.evaluation_only:
            raise ValueError("train_only (--train-only) writes train, and evaluation_only none: give one of them")

    @property
    def splits(self) -> tuple[str, ...]:
        """Name the splits that families may go to."""
        if self.evaluation_only or self.train_only:
            return ("test_ood",) if self.evaluation_only else ("train",)
        return ("train", "test_iid") if self.every_family else SPLITS

    def insert_states_of(self, path: str) -> bool | None:
        """Say whether the families of a file have insert states; None if each family's annotation has to decide."""
        if self.insert_states is not None:
            return self.insert_states
        return False if self.release else told_by_name(path)

    def records(self, family: Family) -> Iterator[tuple[str, Family]]:
        """Yield the (split, record) that one family gives."""
        records = split_records(family, self._split(family), pairs=self.pairs)
        return (record for record in records if record[0] in self.splits)

    def why_without_record(self, family: Family) -> str:
        """Say why a family gives no record."""
        if (split := self._split(family)) not in self.splits:
            return f"of {split}, and train alone is written"
        return "no two rows with an aligned residue"

    def _split(self, family: Family) -> str:
        if self.evaluation_only:
            return "test_ood"
        return "train" if self.every_family else split_of(family.unit)


@dataclass
class Report:
    """Result of a build: records a split; malformed families skipped and others dropped, each with the reason."""

    records: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)  # files, and the sums of `counts` over all families

    def summary(self, with_clans: bool) -> str:
        """Return a line that says what was read; `with_clans` if there was a table of clans."""
        read = Counter(self.read)
        families, unknown = read["families"], ", ".join(vocab.AMBIGUOUS)
        files = f"{read['files']:,} file{'s' * (read['files'] != 1)}: {families:,} families, {read['rows']:,} rows"
        residues = f"{read['residues']:,} residues, {read['unknown_letters']:,} of them unknown ({unknown})"
        known = f"; the table of clans knows {read['known_to_clans']:,} of {families:,} families" if with_clans else ""
        inserts = read["insert_states"]
        marked = f"; in {inserts:,} of {families:,} families lower case is aligned with nothing" if inserts else ""
        return f"read {files}, {residues}{known}{marked}"

    def check(self, clans: dict[str, str], kept: int) -> None:
        """Raise ValueError if no family is kept, or none is in the table of clans; warn of what seems to be wrong.

        A table of clans should know half of the families. Most families should not seem to have insert states where
        nothing says so.
        """
        read = Counter(self.read)
        if not kept:
            reasons = [*self.skipped, *self.dropped]
            first = f"; the first: {reasons[0]}" if reasons else ""
            told = f"{len(self.skipped)} malformed, {len(self.dropped)} left out"
            raise ValueError(f"no family to write: {read['families']} were read, {told}{first}")
        if 2 * read["seem_insert_states"] > read["families"]:
            warnings.warn(
                f"{read['seem_insert_states']} of the {read['families']} families seem to be aligned by a profile HMM, "
                "with insert states in lower case, which are not aligned with each other; they are read as aligned "
                "here: give --insert-states (insert_states=True), or --no-insert-states to stay with that",
                stacklevel=2,
            )
        if not clans or 2 * read["known_to_clans"] >= read["families"]:
            return
        accession, clan = next(iter(clans.items()))
        told = (
            f"clans: the table knows {read['known_to_clans']} of the {read['families']} families; expected are lines "
            f"'accession<tab>clan<tab>...', the first has the accession {accession!r} and the clan {clan!r}"
        )
        if not read["known_to_clans"]:
            raise ValueError(f"{told}: give the table of these families")
        warnings.warn(f"{told}: each other family is a clan of its own", stacklevel=2)


@dataclass(frozen=True)
class Candidate:
    """A family of the input, without its sequences, and the splits to which it would give records."""

    place: Place
    path: str
    accession: str
    rows: int
    splits: tuple[str, ...]
    why: str  # it has no splits, else ""
    residues: int
    unknown_letters: int
    known_to_clans: bool
    insert_states: bool
    seem_insert_states: bool  # but nothing says so


def candidate(
    place: Place, path: str, family: Family, splits: tuple[str, ...], clans: dict[str, str], recipe: Recipe
) -> Candidate:
    letters = vocab.count_letters(family.alignment)
    undecided = not family.insert_states and recipe.insert_states_of(path) is None
    return Candidate(
        place,
        path,
        family.accession,
        len(family.rows),
        splits,
        why="" if splits else recipe.why_without_record(family),
        residues=letters.total(),
        unknown_letters=sum(letters[letter] for letter in vocab.AMBIGUOUS),
        known_to_clans=family.accession in clans,
        insert_states=family.insert_states,
        seem_insert_states=undecided and seem_insert_states(family.alignment),
    )


def counts(found: Candidate) -> Counter[str]:
    """Return what a family adds to `Report.read`."""
    names = ("rows", "residues", "unknown_letters", "known_to_clans", "insert_states", "seem_insert_states")
    return Counter(families=1, **{name: int(getattr(found, name)) for name in names})


def choose(candidates: list[Candidate]) -> tuple[Candidate | None, list[str]]:
    """Choose among families of one accession the first with most rows; return it and why the others are left out."""
    left_out = [f"{c.accession} of {c.path}: {c.why}" for c in candidates if not c.splits]
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

    A malformed family, nucleotides, or a file without any family raise ValueError; with `skip_bad`, `skipped` gets the
    message. A file of which some families have insert states and some do not raises ValueError in any case.
    """
    families = 0

    def bad(error: ValueError) -> None:
        nonlocal families
        families += 1
        if not recipe.skip_bad:
            raise error
        skipped(str(error))

    on_bad = bad if recipe.skip_bad else None
    has_insert_states = Decision(path, recipe.insert_states_of(path))
    for alignment in stockholm.read(path, max_family_bytes=recipe.max_family_bytes, on_bad=on_bad):
        families += 1
        insert_states = has_insert_states(alignment)
        try:
            family = from_alignment(alignment, clans, path, insert_states=insert_states)
        except ValueError as error:
            bad(StockholmError(path, alignment.line, alignment.name, str(error)))
        else:
            yield limit_rows(family, recipe.max_rows)
    if not families:
        bad(ValueError(f"{path} holds no family: it is empty; give Stockholm alignments"))
