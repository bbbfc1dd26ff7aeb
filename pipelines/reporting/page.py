"""Runs as one HTML page: figures, clips, curves, times, alarms and settings.

    run folders -> records -> tables, charts, clips -> one template -> report.html

The page is one file. Clips and pictures are inside it as data, curves are inline SVG, and its
policy forbids every request, so it can be mailed, attached to a ticket or opened on a phone.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.storage import write_text
from pipelines.media.charts import NUM_COLOURS, number
from pipelines.media.pages import page_templates
from pipelines.reporting.alarms import alarm_kinds
from pipelines.reporting.checkpoints import ranked_checkpoints
from pipelines.reporting.clips import Media, clip_table
from pipelines.reporting.curves import LabelledRun, training_cards, validation_cards
from pipelines.reporting.events import event_rows
from pipelines.reporting.headline import comparison_note, criteria, figure_table, tiles
from pipelines.reporting.names import duration
from pipelines.reporting.records import RunRecords, finite, read_run
from pipelines.reporting.settings import differing_facts, differing_settings, facts
from pipelines.reporting.sizes import size_rows
from pipelines.reporting.times import critical_path, role_seconds, stage_times, utilisation
from pipelines.run.opened_copy import working_copy
from pipelines.run.outputs import require_inside, require_lasting_folder, require_output_folder
from pipelines.run.places import shared_place

T = TypeVar("T")

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
_ASSETS = Path(__file__).parent / "assets"
_MAX_SHEETS = 4


def write_report(run_folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the page of a run, finished or not, or a comparison of several.

    Args:
        run_folders: The runs, at least one: paths or addresses.
        output: File to write; None writes report.html into the folder of a single run, and
            comparison.html beside the folder of the first one of several.

    Returns:
        The file; of one at an address, what `cluster.stores.store_address` reads.

    Raises:
        CheckpointError: One of the folders holds nothing of a run.
    """
    if output:
        require_lasting_folder(output, "--output")  # before anything is read
    with ExitStack() as stack:
        folders = [stack.enter_context(working_copy(folder)) for folder in run_folders]
        return write_page([read_run(folder) for folder in folders], output)


def write_page(runs: Sequence[RunRecords], output: str | Path | None = None) -> Path:
    """Writes the page of runs that have been read; see `write_report`."""
    first = Path(shared_place(runs[0].folder.root))
    beside = first / REPORT_FILE if len(runs) == 1 else first.parent / COMPARISON_FILE
    path = Path(output) if output else beside
    if not output and len(runs) == 1:
        require_inside(first, REPORT_FILE)
    require_output_folder(path, "--output", is_file=True)
    write_text(shared_place(path), report_html(runs))
    return path


def report_html(runs: Sequence[RunRecords]) -> str:
    """HTML of the report as one text that refers to no other file."""
    # Whatever a run has recorded is escaped; what is trusted is marked so in the template.
    templates = page_templates(_ASSETS)
    templates.filters |= {"duration": duration, "number": number}
    labelled = [LabelledRun(label, run) for label, run in zip(_labels(runs), runs, strict=True)]
    return templates.get_template("page.html.j2").render(_content(labelled))


def _content(runs: Sequence[LabelledRun]) -> dict[str, Any]:
    """Everything that the template shows."""
    records = [run.records for run in runs]
    media = Media()
    first_cards, more_cards = training_cards(runs)
    leading_figures, other_figures = validation_cards(runs)
    clips = clip_table(runs, media)
    alone = runs[0].records if len(runs) == 1 else None
    return {
        "style": (_ASSETS / "style.css").read_text(encoding="utf-8"),
        "script": (_ASSETS / "page.js").read_text(encoding="utf-8"),
        "num_colours": NUM_COLOURS,
        "title": alone.name if alone else f"{len(runs)} runs compared",
        "runs": [_run(run) for run in runs],
        "tiles": tiles(alone.evaluation) if alone else [],
        "criteria": criteria(runs),
        "figures": figure_table(runs),
        "comparison_note": comparison_note(runs),
        "setting": _setting(records),
        "settings": differing_settings(records) if not alone else [],
        "versions": differing_facts(records) if not alone else [],
        "clips": clips,
        "sheets": _sheets(alone, media, with_loop=clips is None) if alone else [],
        "training": first_cards,
        "more_training": more_cards,
        "validation": leading_figures,
        "more_validation": other_figures,
        "samples": _samples(alone, media) if alone else [],
        "stages": role_seconds(records) if not alone else [],
        "media_notes": media.notes,
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _run(run: LabelledRun) -> dict[str, Any]:
    """Returns the page's section of one run."""
    records = run.records
    used, recorded = utilisation(records)
    return {
        "label": run.label,
        "facts_line": _facts_line(records),
        "notes": records.notes,
        "alarms": alarm_kinds(records.alarms),
        "events": event_rows(records.events),
        "ranking": ranked_checkpoints(records),
        "alarms_recorded": records.alarms_recorded,
        "utilisation": used,
        "utilisation_recorded": recorded,
        "critical_path": critical_path(records),
        "stages": stage_times(records),
        "sizes": size_rows(records),
        "seconds": records.seconds,
        "num_iterations": records.num_iterations,
        "facts": facts(records),
        "config_text": records.config_text,
    }


def _facts_line(run: RunRecords) -> list[str]:
    found = [f"{run.num_iterations:,} iterations"]
    if run.metrics:
        found.append(duration(run.seconds))
        seen = finite([line.number("samples_seen") for line in run.metrics])
        found += [f"{max(seen):,.0f} captions seen"] if seen else []
    method = run.setting("objective", "method")
    form, tracking = run.setting("objective", "form"), run.setting("fake_score", "tracking")
    found += [str(method)] if method else []
    found += [f"{form} form"] if form else []
    found += [f"{tracking} tracking"] if tracking else []
    return found


def _setting(runs: Sequence[RunRecords]) -> list[str]:
    """Returns what was measured on what; one line for each setting of a measured run."""
    lines: dict[str, None] = {}
    for run in runs:
        entry = run.evaluation
        if {"num_captions", "device"} <= entry.keys():
            different = entry.get("num_distinct_captions")
            lines[
                f"{entry['num_captions']} held-out captions"
                + (f" ({different} different)" if different else "")
                + f", one clip each; seconds at batch {entry.get('batch_size', '?')} on "
                + str(entry["device"])
            ] = None
    return list(lines)


def _labels(runs: Sequence[RunRecords]) -> list[str]:
    """A name for each run: its own, its folder's where two share it, or else its path."""
    candidates = (
        [run.name for run in runs],
        [run.folder.root.name for run in runs],
        [str(run.folder) for run in runs],
    )
    return next(
        (names for names in candidates if max(Counter(names).values()) == 1), candidates[-1]
    )


def _sheets(run: RunRecords, media: Media, *, with_loop: bool) -> list[tuple[str, str]]:
    """Pictures of the evaluation: (address, caption). The loop only where no clips are shown."""
    wanted = [("sheet_png", "The clips frame by frame")]
    if with_loop:
        wanted.insert(0, ("sheet_gif", "Same prompts and, row by row, the same initial noise"))
    return [
        (source, caption)
        for key, caption in wanted
        if isinstance(name := run.evaluation.get(key), str)
        and (source := media.put_file(run.folder.root, name))
    ]


def _samples(run: RunRecords, media: Media) -> list[tuple[str, str]]:
    """Contact sheets of the validations, evenly spaced: (address, caption)."""
    lines = [line for line in run.validations if "sheet" in line.texts]
    return [
        (source, f"After {line.iteration} iterations")
        for line in _spread(lines, _MAX_SHEETS)
        if (source := media.put_file(run.folder.samples, line.texts["sheet"]))
    ]


def _spread(entries: Sequence[T], count: int) -> list[T]:
    """Evenly spaced entries, the first and the last among them."""
    if len(entries) <= count:
        return list(entries)
    return [entries[round(index * (len(entries) - 1) / (count - 1))] for index in range(count)]
