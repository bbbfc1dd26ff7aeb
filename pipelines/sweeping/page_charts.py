"""Pictures of a sweep's page."""

import math
from collections.abc import Sequence
from typing import Any

from pipelines.config.sweep import Dimension, SweepSettings
from pipelines.media.charts import Series, line_chart, number
from pipelines.media.scatter import Dot, Scale, parallel_coordinates, scatter
from pipelines.reporting.curves import ChartCard
from pipelines.reporting.names import about, title
from pipelines.sweeping.results import SweepResult, TriedPoint
from pipelines.sweeping.space import share_of
from pipelines.sweeping.trials import Trial, settings_in_words, value_in_words

_MOST_CURVES = 6


def response_cards(settings: SweepSettings, points: Sequence[TriedPoint]) -> list[ChartCard]:
    """One picture for every searched figure over every searched setting."""
    return [
        ChartCard(
            f"{title(figure)} over {key}",
            _choices(dimension),
            (),
            _response(points, key, dimension, figure),
        )
        for figure in settings.objectives
        for key, dimension in settings.dimensions.items()
    ]


def _choices(dimension: Dimension) -> str:
    """Legend of a choice that is not a number, whose places are counted."""
    if dimension.choice is None or _is_numeric(dimension):
        return ""
    return ", ".join(f"{place}: {value_in_words(v)}" for place, v in enumerate(dimension.choice))


def _is_numeric(dimension: Dimension) -> bool:
    return dimension.choice is not None and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in dimension.choice
    )


def _place(dimension: Dimension, value: Any) -> float:  # noqa: ANN401 - any YAML
    if dimension.choice is not None and not _is_numeric(dimension):
        return float(dimension.choice.index(value))
    return float(value)


def _response(points: Sequence[TriedPoint], key: str, dimension: Dimension, figure: str) -> str:
    dots: list[Dot] = []
    for point in points:
        if key not in point.settings:
            continue
        x, words = _place(dimension, point.settings[key]), settings_in_words(point.settings)
        if point.is_done and math.isfinite(point.value(figure)):
            y = point.value(figure)
            # Trials of one seed share their clips: intervals over clips would hide what differs.
            interval = point.contender(figure).interval if len(point.trials) > 1 else None
            dots.append(Dot(x, y, f"{words}: {number(y)}", "c0", interval))
        else:
            dots += [
                Dot(x, trial.figures[figure], f"{words}, at iteration {trial.iteration}", "faint")
                for trial in point.trials
                if figure in trial.figures
            ]
    return scatter(
        dots,
        log_x=dimension.is_log,
        band=dimension.choice is None,
        names=f"{title(figure)} over {key}",
    )


def pareto_cards(settings: SweepSettings, result: SweepResult) -> list[ChartCard]:
    """The score against each figure that is searched beside it; the front is a line."""
    cards = []
    on_front = result.front
    for figure in settings.tradeoffs:
        done = [point for point in result.points if point.is_done]
        dots = [
            Dot(point.value(figure), point.value(settings.score), settings_in_words(point.settings))
            for point in done
        ]
        line = sorted((point.value(figure), point.value(settings.score)) for point in on_front)
        heading = f"{title(settings.score)} (upwards) over {title(figure)}"
        good = f"Good: a {_good(settings.mode)} {title(settings.score)}, a "
        good += f"{_good(settings.tradeoffs[figure])} {title(figure)}"
        cards.append(ChartCard(heading, good, (), scatter(dots, path=line, names=heading)))
    return cards


def _good(mode: str) -> str:
    return "small" if mode == "min" else "large"


def learning_cards(settings: SweepSettings, trials: Sequence[Trial]) -> list[ChartCard]:
    """Every searched figure over iterations: the best trials, and how far all others are."""
    cards = []
    for figure in settings.objectives:
        curves = [
            Series(
                trial.in_words,
                [float(at) for at, _ in trial.curve],
                [values.get(figure, math.nan) for _, values in trial.curve],
            )
            for trial in trials
            if trial.curve
        ]
        best, others = curves[:_MOST_CURVES], curves[_MOST_CURVES:]
        words = f"The best {len(best)} trials. {about(figure)}"
        cards.append(ChartCard(title(figure), words, (), line_chart(best)))
        if others:
            heading = f"{title(figure)}, the other {len(others)} trials"
            cards.append(ChartCard(heading, "", (), line_chart(others)))
    return cards


def parallel_picture(settings: SweepSettings, result: SweepResult) -> str:
    """One line a point over every searched setting and figure."""
    points = [
        point
        for point in result.points
        if any(settings.score in trial.figures for trial in point.trials)
    ]
    dimensions = settings.dimensions
    scales = [
        Scale(
            key.rpartition(".")[2],
            [_share(dimension, point.settings.get(key)) for point in points],
            value_in_words(dimension.corners[0]),
            value_in_words(dimension.corners[-1]),
        )
        for key, dimension in dimensions.items()
    ]
    for figure in settings.objectives:
        values = [_latest(point, figure) for point in points]
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        places = [(value - low) / ((high - low) or 1.0) for value in values]
        scales.append(Scale(figure, places, number(low), number(high)))
    front = [dict(point.settings) for point in result.front]
    shades = [
        0.0 if dict(point.settings) in front else (1 + place) / len(points)
        for place, point in enumerate(points)
    ]
    labels = [
        f"{settings_in_words(point.settings)}: {number(_latest(point, settings.score))}"
        for point in points
    ]
    return parallel_coordinates(scales, labels, shades)


def _share(dimension: Dimension, value: Any) -> float:  # noqa: ANN401 - any YAML
    if value is None:
        return math.nan
    if dimension.choice is not None:
        return dimension.choice.index(value) / max(1, len(dimension.choice) - 1)
    return share_of(dimension, value)


def _latest(point: TriedPoint, figure: str) -> float:
    value = point.value(figure)
    return point.trials[0].figures.get(figure, math.nan) if math.isnan(value) else value
