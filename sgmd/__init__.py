"""Public interface of sgmd: Score Gradient Matching Distillation on Ray.

    mathematics   SgmdObjective and the other methods, FlowMatchSchedule, RandomSteps, rollout,
                  euler_sample
    methods       the protocols that a method implements, and what they are written with
    formulas      matching_direction and the other pure functions that the methods are made of
    records       NoisedBatch, GeneratorSignal, Loss, MicroBatchKey
    shapes        Latents, PerSample, Text, for annotations
    worlds        GaussianVelocity, a teacher whose scores are exact
    measures      Measure, and the ClipView that it is taken of
    models        family_of; ModelFamily, Denoiser, and what a family is written with
    programs      load_recipe, distill, evaluate, generate, pretrain, sweep, and what they take
    data          Feed, StreamSettings, Source, and what they are made of
    errors        SgmdError and the errors below it

Names that are not in `__all__` are private. `__init__.pyi` lists those that are, for type checkers
and for the running program alike: a copy of the package without that file cannot be imported. A
name is imported when it is first used, so the mathematics needs neither Ray nor diffusers.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any


def _listed() -> dict[str, tuple[str, ...]]:
    """Names by module, as the stub beside this file imports them."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (each.name for each in node.names)
            found[node.module] = (*found.get(node.module, ()), *names)
    return found


NAMES_BY_MODULE = _listed()
_MODULE_OF = {name: module for module, names in NAMES_BY_MODULE.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
