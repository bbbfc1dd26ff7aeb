"""A run as one HTML page: figures, clips, curves, times and settings.

The page is one file. Pictures are inside it as data, curves are inline SVG, and it asks for nothing
from the network, so it can be mailed, attached to a ticket or opened on a phone.
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from cluster.storage import write_text
from pipelines.charts import Series, line_chart, number
from pipelines.evaluation import (
    GENERATOR,
    REFERENCE,
    TEACHER_FEW,
    Evaluation,
    columns_shown,
    legend,
)
from pipelines.report_records import RunRecords, read_run

REPORT_FILE = "report.html"
_STYLE = Path(__file__).parent / "report_assets" / "style.css"
_MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif"}
# Base64 adds a third, so that the page stays below 15 MB.
_MAX_MEDIA_BYTES = 10 * 2**20
_MAX_SHEETS = 4

_EXPLAINED = {
    "fisher": "How far the fake score is from the teacher on the generator's clips",
    "negative_residual": "The fake score's error on the clips, which the generator pushes up",
    "residual_contraction": "The same error, which the fake score's tracking pushes down",
    "generator": "What the generator minimises",
    "frechet": "Distance to the teacher's clips; its floor is not taken off",
    "colour": "Share of clips in the caption's colour",
    "shape": "Share of clips with the caption's shape",
    "direction": "Share of clips that move the caption's way",
    "speed_spearman": "Rank correlation of measured and captioned speed",
    "mean_speed_px_per_frame": "Mean measured speed",
}


@dataclass(slots=True)
class _Media:
    """Files put into the page, up to a limit.

    Attributes:
        root: Folder that names are relative to.
        left_bytes: What may still be put in.
        left_out: Names of files that were too large by then.
    """

    root: Path
    left_bytes: int = _MAX_MEDIA_BYTES
    left_out: list[str] = field(default_factory=list)

    def figure(self, name: str, caption: str, *, wide: bool = False) -> str:
        """A picture with its caption; a note where the file is missing or too large.

        A wide picture keeps its width on a narrow screen and is moved sideways.
        """
        path = self.root / name
        if not path.exists():
            return f'<p class="missing">{escape(name)} is not there.</p>'
        size = path.stat().st_size
        if size > self.left_bytes:
            self.left_out.append(name)
            return f'<p class="missing">{escape(name)} ({size / 2**20:.1f} MB) is left out.</p>'
        self.left_bytes -= size
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        source = f"data:{_MEDIA_TYPES[path.suffix]};base64,{data}"
        text = escape(caption)
        return (
            f'<figure><div class="{"wide" if wide else "fitted"}">'
            f'<img src="{source}" alt="{escape(caption, quote=True)}"></div>'
            f"<figcaption>{text}</figcaption></figure>"
        )


def write_report(run_folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run, finished or not.

    Args:
        run_folder: The run.
        output: File to write; None writes report.html into the run's folder.

    Returns:
        The file.

    Raises:
        CheckpointError: It is not a run folder, or a file in it cannot be read.
    """
    records = read_run(run_folder)
    path = Path(output) if output else records.folder.root / REPORT_FILE
    write_text(str(path), report_html(records))
    return path


def report_html(records: RunRecords) -> str:
    """The page as text."""
    media = _Media(records.folder.root)
    body = [
        _header(records),
        _headline(records.evaluation),
        _clips(records.evaluation, media),
        _curves(records),
        _validation(records, media),
        _times(records),
        _settings(records),
    ]
    style = _STYLE.read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(records.name)}: distillation report</title>",
            f"<style>{style}</style></head><body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )


def _header(records: RunRecords) -> str:
    facts = [f"{records.num_iterations:,} iterations"]
    if records.metrics:
        facts += [
            _duration(records.seconds),
            f"{records.metrics[-1]['samples_seen']:,} captions seen",
        ]
    objective = records.config.get("objective") or {}
    tracking = (records.config.get("fake_score") or {}).get("tracking")
    facts.append(str(objective.get("method", "sgmd")))
    if objective.get("form"):
        facts.append(f"{objective['form']} form")
    if tracking:
        facts.append(f"{tracking} tracking")
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in records.notes)
    return (
        f'<p class="faint">Few-step distillation</p><h1>{escape(records.name)}</h1>'
        f'<p class="faint">{escape(" · ".join(facts))}</p>{notes}'
    )


def _headline(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    return _section(
        "Generator against teacher",
        f'<div class="tiles">{"".join(_tiles(evaluation))}</div>{_verdicts(evaluation)}',
        f'<div class="card scroll">{_evaluation_table(evaluation)}</div>',
        "".join(f'<p class="note">{escape(line)}</p>' for line in legend(evaluation).splitlines()),
    )


def _tiles(evaluation: Evaluation) -> list[str]:
    generator, reference = evaluation.row(GENERATOR), evaluation.row(REFERENCE)
    faster = reference.seconds_per_clip / generator.seconds_per_clip
    tiles = [
        (f"{generator.num_steps}", f"steps, where the teacher takes {reference.num_steps} guided"),
        (f"{number(faster)}×", "faster a video, decoding included"),
    ]
    if generator.ratio is not None:
        few = evaluation.row(TEACHER_FEW).num_steps
        about = f"of the teacher's distance in {few} unguided steps"
        tiles.append((f"{generator.ratio.value:.2f}", about))
    for value, what in ((generator.colour, "colours"), (generator.direction, "directions")):
        if value is not None:
            tiles.append((f"{value:.0%}", f"of the {what} right"))
    if generator.speed_ratio is not None:
        tiles.append((f"{generator.speed_ratio:.0%}", "of the teacher's mean speed"))
    return [
        f'<div class="card tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small in tiles
    ]


def _verdicts(evaluation: Evaluation) -> str:
    items = [
        f'<li class="{"met" if verdict.passed else "unmet"}">{escape(verdict.criterion)}: '
        f"<b>{escape(verdict.found)}</b></li>"
        for verdict in evaluation.verdicts
    ]
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _evaluation_table(evaluation: Evaluation) -> str:
    columns = columns_shown(evaluation)
    head = _row(["sampled by", *(column.heading for column in columns)], tag="th")
    body = [
        _row(
            [row.label, *(column.text(row) for column in columns)],
            css="generator" if row.name == GENERATOR else "",
        )
        for row in evaluation.rows
    ]
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _clips(evaluation: Evaluation | None, media: _Media) -> str:
    if evaluation is None:
        return ""
    note = "Same prompts and, row by row, the same initial noise."
    return _section(
        "Clips",
        media.figure(evaluation.sheet_gif, note),
        media.figure(evaluation.sheet_png, "The same clips, frame by frame.", wide=True),
    )


def _curves(records: RunRecords) -> str:
    if not records.metrics:
        return ""
    lines = records.metrics
    at = [line["iteration"] + 1 for line in lines]
    cards = [
        _chart_card(name, [_series(name, at, [line["losses"].get(name) for line in lines])])
        for name in _names(line["losses"] for line in lines)
    ]
    roles = _names(line["grad_norms"] for line in lines)
    norms = [_series(role, at, [line["grad_norms"].get(role) for line in lines]) for role in roles]
    cards.append(_chart_card("gradient norm", norms, "Before clipping", log=True))
    waits = [
        _series("iteration", at, [line["seconds"]["total"] for line in lines]),
        _series("waiting for captions", at, [line["data_wait_s"] for line in lines]),
    ]
    cards.append(_chart_card("seconds", waits, "Wall-clock time of an iteration"))
    note = "Over iterations: faint as recorded, bold a running median."
    return _section(
        "Training",
        f'<p class="note">{note}</p><div class="cards">{"".join(cards)}</div>',
    )


def _validation(records: RunRecords, media: _Media) -> str:
    lines = records.validations
    if not lines:
        return ""
    at = [line["iteration"] for line in lines]
    cards = [
        _chart_card(name, [_series(name, at, [line["figures"].get(name) for line in lines])])
        for name in _names(line["figures"] for line in lines)
    ]
    sheets = [
        media.figure(f"samples/{line['sheet']}", f"After {line['iteration']} iterations", wide=True)
        for line in _spread(lines, _MAX_SHEETS)
    ]
    return _section(
        "Validation during the training",
        '<p class="note">Averaged weights, on held-out captions; fewer clips than above.</p>',
        f'<div class="cards">{"".join(cards)}</div>',
        f"<details><summary>Clips on the way</summary>{''.join(sheets)}</details>",
    )


def _times(records: RunRecords) -> str:
    if not records.metrics:
        return ""
    spent: dict[str, float] = {}
    for line in records.metrics:
        for stage, seconds in line["seconds"].items():
            spent[stage] = spent.get(stage, 0.0) + seconds
    total = spent.pop("total")
    spent["waiting for captions"] = sum(line["data_wait_s"] for line in records.metrics)
    longest = max(*spent.values(), 1e-9)
    rows = [
        _row(
            [
                stage,
                _duration(seconds),
                f"{seconds / records.num_iterations:.3f}",
                f"{seconds / total:.0%}" if total else "",
            ],
            bar=seconds / longest,
        )
        for stage, seconds in sorted(spent.items(), key=lambda item: -item[1])
    ]
    head = _row(["role.stage", "seconds", "an iteration", "of the run", ""], tag="th")
    note = (
        f"{_duration(total)} in all, {total / records.num_iterations:.3f} s an iteration. Roles "
        "work side by side, so their shares may add up to more than 100%."
    )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return _section(
        "Where the time went",
        f'<p class="note">{escape(note)}</p><div class="card scroll">{table}</div>',
    )


def _settings(records: RunRecords) -> str:
    summary = records.summary
    facts: dict[str, Any] = {
        "run folder": records.folder.root,
        "seed": summary.get("seed", records.config.get("seed")),
        "configuration": summary.get("config_digest"),
        "revision": summary.get("git_revision"),
        **summary.get("versions", {}),
    }
    rows = [_row([name, str(value)]) for name, value in facts.items() if value not in (None, "")]
    return _section(
        "Settings and versions",
        f'<div class="card scroll"><table><tbody>{"".join(rows)}</tbody></table></div>',
        '<details class="card"><summary>config.yaml</summary>'
        f"<pre>{escape(records.config_text)}</pre></details>",
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _chart_card(name: str, curves: Sequence[Series], about: str = "", *, log: bool = False) -> str:
    about = about or _EXPLAINED.get(name, "")
    legend_items = "".join(
        f'<span><i class="c{index % 6}"></i>{escape(curve.label)}</span>'
        for index, curve in enumerate(curves)
    )
    shown_legend = f'<div class="legend">{legend_items}</div>' if len(curves) > 1 else ""
    return (
        f'<div class="card"><h3>{escape(name.replace("_", " "))}</h3>'
        f'<p class="note">{escape(about)}</p>{shown_legend}{line_chart(curves, log=log)}</div>'
    )


def _series(label: str, at: Sequence[float], values: Sequence[float | None]) -> Series:
    """A curve; what a line does not have is a gap."""
    gap = float("nan")
    return Series(label, at, [gap if value is None else value for value in values])


def _names(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """All keys, those explained here first, in the order of the explanations."""
    found = dict.fromkeys(name for entry in dicts for name in entry)
    known = [name for name in _EXPLAINED if name in found]
    return [*known, *(name for name in found if name not in _EXPLAINED)]


def _row(cells: Sequence[str], tag: str = "td", css: str = "", bar: float | None = None) -> str:
    shown = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    if bar is not None:
        shown += f'<td class="bars"><span class="bar" style="width:{100 * bar:.1f}%"></span></td>'
    return f'<tr class="{css}">{shown}</tr>' if css else f"<tr>{shown}</tr>"


def _spread(lines: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Evenly spaced entries, the first and the last among them."""
    if len(lines) <= count:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (count - 1))] for index in range(count)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
