"""`sgmd prepare`: videos and captions as people keep them become shards.

    list_clips -> fresh_clips -> prepare_clip, in processes -> shards, quarantine -> index

Clips arrive in the order of the source, whatever the number of processes, so the same source makes
the same shards. Memory holds one shard, two clips a process, and eight bytes an id.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from cluster.s3.settings import S3Settings
from pipelines.data.clips.guarded_process import Died
from pipelines.data.clips.hang_guard import MAX_HANG_S
from pipelines.data.making.caption_choice import CaptionChoice
from pipelines.data.making.caption_field import CaptionField
from pipelines.data.making.fresh_clips import Place, fresh_clips
from pipelines.data.making.journal import MIN_JUDGED, Journal, filling, open_journal
from pipelines.data.making.manifest_rows import MANIFEST_SUFFIXES
from pipelines.data.making.ordered_pool import map_in_order
from pipelines.data.making.prepare_clip import (
    ClipRules,
    PreparedClip,
    clips_of_captions,
    prepare_clip,
)
from pipelines.data.making.set_report import SetReport, set_facts
from pipelines.data.making.skipped import (
    LONELY_CAPTIONS,
    MANIFESTS,
    SkippedFiles,
    SkippedKind,
)
from pipelines.data.making.source_clip import Columns, SourceClip
from pipelines.data.making.sources import PROMPTS_SUFFIX, list_clips
from pipelines.data.making.witnesses import Listing, Witnesses
from pipelines.data.shards.filesystem import canonical_address
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.schema import (
    CAPTION,
    FPS,
    SAMPLE_ID,
    VIDEO,
    caption_schema,
    video_schema,
)
from pipelines.data.shards.seen import SeenIds
from pipelines.data.shards.shard_writing import ShardBuilder
from sgmd_core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """Options of making shards of a source.

    Attributes:
        columns: Names in manifests and JSON files.
        rules: What is asked of a clip, and what is made of it.
        shard_clips: Most clips in a shard.
        shard_bytes: A shard is closed when it has reached this size.
        max_bad_fraction: The command stops where a larger share of the clips is bad.
        retry_bad: Try again what an earlier run did not take.
        num_processes: Processes that read and decode; 0 works in this one, None takes all cores.
        max_hang_s: Time that one call of the decoder may take in such a process.
        s3: How to speak to the servers of source and videos.
    """

    columns: Columns = field(default_factory=Columns)
    rules: ClipRules = field(default_factory=ClipRules)
    shard_clips: int = 512
    shard_bytes: int = 256 * 2**20
    max_bad_fraction: float = 0.01
    retry_bad: bool = False
    num_processes: int | None = None
    max_hang_s: float = MAX_HANG_S
    s3: S3Settings = S3Settings()

    def __post_init__(self) -> None:
        if self.shard_clips < 1 or self.shard_bytes < 1 or not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(
                "reading the options of `sgmd prepare`",
                f"shard_clips = {self.shard_clips}, shard_bytes = {self.shard_bytes}, "
                f"max_bad_fraction = {self.max_bad_fraction}",
                "positive sizes and a fraction in [0, 1]",
            )


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """Progress of the command, earlier runs included."""

    num_clips: int
    num_bad: int
    num_shards: int
    num_bytes: int

    @property
    def num_judged(self) -> int:
        """Clips that were looked at."""
        return self.num_clips + self.num_bad


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport(SetReport):
    """Content of a folder of shards, and of its source, at the end of `sgmd prepare`.

    Attributes:
        skipped: Files of the source that are not part of a clip, by kind.
        look: Clips of this run whose look a decoder changes, by property, see `look_of`.
        captions: The rule for clips with several captions.
        num_left_out: Captions of this run's clips that the rule leaves out.
        caption_field: Field of the captions in the JSON files beside the videos, by the first of
            them; empty where there is none, or where the caller names it.
    """

    skipped: Sequence[SkippedKind]
    look: dict[str, int]
    captions: CaptionChoice
    num_left_out: int
    caption_field: str = ""

    def to_json(self) -> dict[str, Any]:
        """Names and values as the command prints them."""
        skipped = [asdict(kind) for kind in self.skipped]
        facts = {"look": self.look, "captions_left_out": self.num_left_out, "skipped": skipped}
        if self.caption_field:
            facts["caption_field"] = self.caption_field
        return SetReport.to_json(self) | facts

    def notes(self) -> Sequence[str]:
        """A line for each kind of what is not in the set."""
        skipped = [f"skipped, {kind.in_words()}" for kind in self.skipped]
        left_out = (
            f"left out, captions of clips that have several: {self.num_left_out} (--captions"
            f" {self.captions}; all takes each of them as a row)"
        )
        field = (
            f"captions of all JSON files are their field {self.caption_field}, by the first of them"
            " (--caption-column names another)"
        )
        return [
            *SetReport.notes(self),
            *skipped,
            *([left_out] if self.num_left_out else []),
            *([field] if self.caption_field else []),
        ]


def prepare(
    src: str,
    dst: str,
    options: PrepareOptions = PrepareOptions(),
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
) -> PrepareReport:
    """Makes shards of captioned videos; run again, it goes on where it was stopped.

    Run again after its end, it adds the clips that have joined the source since.

    Args:
        src: Folder, S3 prefix, tar or manifest; see `list_clips`.
        dst: Folder of the shards, local or `s3://bucket/prefix`.
        options: What is asked and made.
        on_progress: Called after every clip.

    Raises:
        DataError: source or destination cannot be used, too many clips are bad, or there is none.
    """
    started = time.monotonic()
    src = canonical_address(src)
    settings = _settings(src, options)
    open_journal(dst, "prepare", settings)  # refuses before anything is written
    captions_only = src.lower().endswith(PROMPTS_SUFFIX) or options.columns.path is None
    skipped = SkippedFiles()
    field = CaptionField(options.s3)
    clips = list_clips(src, replace(options.columns, several=True), options.s3, skipped)
    listed = Listing(field.settle(clips))
    if next(listed.nearby(), None) is None:
        raise _no_clip(src, captions_only, skipped)
    schema = caption_schema() if captions_only else video_schema()
    with filling(dst, "prepare", settings) as journal:
        try:
            filler, num_before = _fill(journal, src, listed, schema, options, on_progress)
        except DataError as error:
            if aside := _captions_aside(journal.rejections, skipped):
                remedy = f"{error.remedy}. {aside}"
                raise DataError(error.attempted, error.found, error.expected, remedy) from error
            raise
        if not journal.shards:
            raise _no_clip(src, captions_only, skipped, journal.rejections)
        journal.finish()
    return PrepareReport(
        **set_facts(dst, journal, num_before, started),
        skipped=skipped.kinds,
        look=dict(filler.look.most_common()),
        captions=options.rules.captions,
        num_left_out=filler.num_left_out,
        caption_field=field.name,
    )


def _fill(
    journal: Journal,
    src: str,
    listed: Listing,
    schema: pa.Schema,
    options: PrepareOptions,
    on_progress: Callable[[PrepareProgress], None],
) -> tuple["_Filler", int]:
    """Takes every clip that is not there yet; returns the filler and the clips before it."""
    if options.retry_bad:
        journal.forget_rejections()
    num_before = _written(journal).num_clips
    written = SeenIds()
    for sample_ids in journal.sample_ids():
        written.add(sample_ids)
    known: set[Place] = {(found.sample_id, found.source, found.row) for found in journal.rejections}
    is_all = options.rules.captions is CaptionChoice.ALL
    split = partial(clips_of_captions, s3=options.s3) if is_all else None
    outcomes = map_in_order(
        partial(prepare_clip, rules=options.rules, s3=options.s3),
        fresh_clips(listed, written, known, split),
        options.num_processes,
        options.max_hang_s,
    )
    filler = _Filler(journal, options, f"preparing {src}", schema)
    witnesses = Witnesses(listed, options.s3)
    for outcome in outcomes:
        filler.take(witnesses.settle(_of_dead(outcome) if isinstance(outcome, Died) else outcome))
        on_progress(filler.progress())
    filler.close()
    on_progress(filler.progress())
    return filler, num_before


def _no_clip(
    src: str, captions_only: bool, skipped: SkippedFiles, rejected: Sequence[Rejection] = ()
) -> DataError:
    """The error for a source of which nothing is taken; says what lies there instead."""
    if rejected:
        aside = _captions_aside(rejected, skipped)
        return DataError(
            f"preparing {src}",
            f"{len(rejected)} clips, none of which is good; the first: {rejected[0].in_words()}",
            "a good clip",
            "Repair them, and run again with --retry-bad" + (f". {aside}" if aside else ""),
        )
    found = "not a single caption" if captions_only else "not a single video"
    is_file = PurePosixPath(src).suffix.lower() in (PROMPTS_SUFFIX, *MANIFEST_SUFFIXES, ".tar")
    if is_file:
        expected = "a caption in each line or row" if captions_only else "a file that names clips"
        remedy = "Check the content of the file"
    else:
        expected = "video files with captions beside them, or tars of them"
        remedy = "Check the address; videos and tars are found at any depth below it"
        if any(PurePosixPath(each.example).suffix == ".parquet" for each in skipped.kinds):
            remedy = "Parquet files with videos in them are a set already: see `sgmd check SRC`"
    return DataError(
        f"preparing {src}",
        "; ".join([found, *(kind.in_words() for kind in skipped.kinds)]),
        expected,
        remedy,
    )


def _captions_aside(rejected: Sequence[Rejection], skipped: SkippedFiles) -> str:
    """Files that were skipped and may have the captions that are missing; empty without any."""
    kinds = [kind for kind in skipped.kinds if kind.what in (MANIFESTS, LONELY_CAPTIONS)]
    if not kinds or all(each.reason != Reason.MISSING_CAPTION for each in rejected):
        return ""
    return f"Captions may be in what was skipped: {'; '.join(kind.in_words() for kind in kinds)}"


class _Filler:
    """Gathers what the workers return into shards.

    Args:
        journal: What is there already, and where the shards go.
        options: When a shard is full, and how many bad clips are too many.
        attempted: Work that an error names.
        schema: Of clips, or of captions alone.
    """

    def __init__(
        self, journal: Journal, options: PrepareOptions, attempted: str, schema: pa.Schema
    ) -> None:
        self._journal = journal
        self._options = options
        self._attempted = attempted
        self._schema = schema
        self._builder = ShardBuilder(schema)
        self._waiting: list[Rejection] = []
        self.look: Counter[str] = Counter()
        self.num_left_out = 0
        self._written = _written(journal)

    def take(self, outcome: PreparedClip | Rejection) -> None:
        """Adds one clip, good or bad.

        Raises:
            DataError: too many clips are bad; all that was found out until then is kept.
        """
        if isinstance(outcome, Rejection):
            self._waiting.append(outcome)
            if self.progress().num_judged >= MIN_JUDGED:
                self._judge()
            return
        self.look.update(outcome.look)
        self.num_left_out += outcome.num_left_out
        row = {
            SAMPLE_ID: outcome.sample_id,
            CAPTION: outcome.caption,
            VIDEO: outcome.video,
            FPS: outcome.fps,
        }
        self._builder.add({name: row[name] for name in self._schema.names})
        is_full = self._builder.num_rows >= self._options.shard_clips
        if is_full or self._builder.num_bytes >= self._options.shard_bytes:
            self._commit()

    def close(self) -> None:
        """Writes the last shard.

        Raises:
            DataError: too many clips are bad.
        """
        self._commit()
        self._judge()

    def progress(self) -> PrepareProgress:
        """Returns the progress so far."""
        return PrepareProgress(
            num_clips=self._written.num_clips + self._builder.num_rows,
            num_bad=self._written.num_bad + len(self._waiting),
            num_shards=self._written.num_shards,
            num_bytes=self._written.num_bytes + self._builder.num_bytes,
        )

    def _commit(self) -> None:
        if self._builder.num_rows or self._waiting:
            self._journal.commit(_next_part(self._journal), self._builder, self._waiting)
            self._builder, self._waiting = ShardBuilder(self._schema), []
            self._written = _written(self._journal)

    def _judge(self) -> None:
        progress = self.progress()
        most_bad = self._options.max_bad_fraction
        if progress.num_bad > most_bad * progress.num_judged:
            self._commit()
            remedy = "Repair them and run again with --retry-bad, or raise --max-bad-fraction"
            self._journal.require_few_bad(
                self._attempted, most_bad, f"{remedy}; good clips are kept"
            )


def _of_dead(died: Died[SourceClip | Rejection]) -> Rejection:
    clip = died.item
    return Rejection(clip.sample_id, clip.source, clip.row, died.reason, died.in_words)


def _written(journal: Journal) -> PrepareProgress:
    return PrepareProgress(
        num_clips=journal.num_good,
        num_bad=len(journal.rejections),
        num_shards=len(journal.shards),
        num_bytes=sum(shard.num_bytes for shard in journal.shards.values()),
    )


def _next_part(journal: Journal) -> str:
    numbers = [int(part.rpartition("-")[2]) for part in journal.parts]
    return f"part-{max(numbers, default=-1) + 1:05d}"


def _settings(src: str, options: PrepareOptions) -> dict[str, object]:
    """Everything that decides what a clip's row holds: the same in all runs that fill one folder.

    Limits decide which clips are taken and not what they hold, so they may change.
    """
    rules = options.rules
    return {
        "source": src,
        "path_column": options.columns.path,
        # Sets of earlier versions name the usual one.
        "caption_column": options.columns.caption or CAPTION,
        "id_column": options.columns.sample_id,
        **asdict(rules.wanted),
        "crf": None if rules.wanted.keeps_everything else rules.crf,
        "decode_all": rules.whole,
        "captions": str(rules.captions),
        "caption_seed": rules.seed if rules.captions is CaptionChoice.RANDOM else None,
    }
