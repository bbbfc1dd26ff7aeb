"""Chart cards: what was logged over iterations, of one run or of several in one picture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipelines.config.figures import HEADLINE_FIGURES
from pipelines.config.methods import leading_losses
from pipelines.media.charts import Mark, Series, line_chart
from pipelines.reporting.alarms import marks
from pipelines.reporting.names import about, in_order, title
from pipelines.reporting.records import Line, RunRecords

_LOSSES, _NORMS, _SECONDS, _FIGURES = "losses", "grad_norms", "seconds", "figures"
_RATES = "learning_rates"
_LAG, _TRACKING_LAG = "lag", "tracking_lag"

LinesOf = Callable[[RunRecords], Sequence[Line]]


@dataclass(frozen=True, slots=True)
class ChartCard:
    """One picture.

    Attributes:
        title: What it shows.
        about: What that means; may be empty.
        legend: Names of its curves in the order of the colours; empty where there is only one.
        svg: The picture.
    """

    title: str
    about: str
    legend: tuple[str, ...]
    svg: str


@dataclass(frozen=True, slots=True)
class LabelledRun:
    """A run and what it is called on this page."""

    label: str
    records: RunRecords


def training_cards(runs: Sequence[LabelledRun]) -> tuple[list[ChartCard], list[ChartCard]]:
    """Returns the curves that a reader looks at first, and everything else that the lines hold.

    Returns:
        The headline losses (all losses, where an objective has none of those), gradient norms, the
        lag of the fake score where it was measured, and seconds; and the other losses and groups
        of numbers.
    """
    lines = [line for run in runs for line in run.records.metrics]
    at = _alarm_marks(runs)
    losses = _names(lines, _LOSSES)
    leading = [name for name in losses if name in leading_losses()] or losses
    first = [_loss_card(runs, name, at) for name in leading]
    first += _role_cards(runs, _NORMS, "gradient norm", "Before clipping", at)
    lags = _names(lines, _LAG)
    first += [_lag_card(runs, name, at) for name in lags if name == _TRACKING_LAG]
    first += [_seconds_card(runs, at)] if lines else []
    others = [_loss_card(runs, name, at) for name in losses if name not in leading]
    others += _role_cards(runs, _RATES, "learning rate", "By the role's own schedule", at)
    others += [_lag_card(runs, name, at) for name in lags if name != _TRACKING_LAG]
    for group in _other_groups(lines):
        others += [
            _card(f"{title(group)}: {title(name)}", "", _curves(runs, _metrics, group, name), at)
            for name in _names(lines, group)
        ]
    return first, others


def validation_cards(runs: Sequence[LabelledRun]) -> tuple[list[ChartCard], list[ChartCard]]:
    """The figures measured on the way.

    Returns:
        The leading ones (all, where a run has none of those); and the others.
    """
    lines = [line for run in runs for line in run.records.validations]
    at = _alarm_marks(runs)
    names = _names(lines, _FIGURES)
    leading = [name for name in HEADLINE_FIGURES if name in names] or names
    cards = {
        name: _card(title(name), about(name), _curves(runs, _validations, _FIGURES, name), at)
        for name in (*leading, *(name for name in names if name not in leading))
    }
    first = [cards.pop(name) for name in leading]
    return first, list(cards.values())


def _card(
    name: str, text: str, curves: Sequence[Series], at: Sequence[Mark], *, log: bool = False
) -> ChartCard:
    labels = tuple(curve.label for curve in curves) if len(curves) > 1 else ()
    return ChartCard(name, text, labels, line_chart(curves, log=log, marks=at))


def _loss_card(runs: Sequence[LabelledRun], name: str, at: Sequence[Mark]) -> ChartCard:
    return _card(title(name), about(name), _curves(runs, _metrics, _LOSSES, name), at)


def _lag_card(runs: Sequence[LabelledRun], name: str, at: Sequence[Mark]) -> ChartCard:
    """Of the iterations that it was measured before: points between them would be gaps."""
    return _card(title(name), about(name), _curves(runs, _measured, _LAG, name), at)


def _role_cards(
    runs: Sequence[LabelledRun], group: str, name: str, text: str, at: Sequence[Mark]
) -> list[ChartCard]:
    """One picture of a figure with all roles of a run, or one a role with all runs."""
    roles = _names((line for run in runs for line in run.records.metrics), group)
    if len(runs) > 1:
        return [
            _card(f"{name}: {_role(role)}", text, curves, at, log=True)
            for role in roles
            if (curves := _curves(runs, _metrics, group, role))
        ]
    lines = _metrics(runs[0].records)
    curves = [_series(_role(role), lines, group, role) for role in roles]
    return [_card(name, text, curves, at, log=True)] if roles else []


def _seconds_card(runs: Sequence[LabelledRun], at: Sequence[Mark]) -> ChartCard:
    curves = _curves(runs, _metrics, _SECONDS, "total")
    if len(runs) == 1:
        lines = _metrics(runs[0].records)
        curves = [
            _series("iteration", lines, _SECONDS, "total"),
            _series("waiting for captions", lines, "", "data_wait_s"),
        ]
    return _card("seconds", "Wall-clock time of an iteration", curves, at, log=True)


def _alarm_marks(runs: Sequence[LabelledRun]) -> list[Mark]:
    """Of a single run only: in a picture of several they would not say whose they are."""
    return marks(runs[0].records.alarms) if len(runs) == 1 else []


def _names(lines: Iterable[Line], group: str) -> list[str]:
    return in_order(line.groups.get(group, {}) for line in lines)


def _other_groups(lines: Iterable[Line]) -> list[str]:
    known = ("", _LOSSES, _NORMS, _SECONDS, _LAG, _RATES)
    found = dict.fromkeys(group for line in lines for group in line.groups)
    return [group for group in found if group not in known]


def _role(name: str) -> str:
    return name.replace("_", " ")


def _metrics(run: RunRecords) -> Sequence[Line]:
    """Lines of metrics, counted by the updates made after them, as validations are."""
    return [Line(line.iteration + 1, line.groups, line.texts) for line in run.metrics]


def _measured(run: RunRecords) -> Sequence[Line]:
    """Lines before whose iteration the lag was measured: by the updates made before."""
    return [line for line in run.metrics if _LAG in line.groups]


def _validations(run: RunRecords) -> Sequence[Line]:
    return run.validations


def _curves(runs: Sequence[LabelledRun], lines_of: LinesOf, group: str, name: str) -> list[Series]:
    """One curve a run, in the runs' own order, so that each keeps its colour."""
    return [
        _series(run.label if len(runs) > 1 else title(name), lines_of(run.records), group, name)
        for run in runs
    ]


def _series(label: str, lines: Sequence[Line], group: str, name: str) -> Series:
    x = [line.iteration for line in lines]
    return Series(label, x, [line.number(name, group) for line in lines])
