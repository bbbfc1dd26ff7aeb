"""Cost of few steps for a teacher of the world `open`, in floors.

    python benchmarks/open_world.py MODEL --clips 256 --floors 3

Samples the teacher in many guided steps (the reference), the same from other seeds (the floors),
and in few steps, and compares sets with the reference: Frechet distance, and the distributions of
`workers.set_measures`. A ratio is taken to the mean over the floors. Clips rendered by the world
itself, with the same captions, stand beside them: how far the teacher is from what it has learnt.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from cluster.storage import write_json
from pipelines.embedded_worlds import embedded_world
from pipelines.evaluation.plan import EvaluationOptions, Subject
from pipelines.media.inference import read_inference_settings
from pipelines.shapes import ClipSplit
from sgmd_core.metrics.frechet import clip_features, fit_gaussian, frechet_distance
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.readings import motion_of, read_clips, score_reading
from workers.build import encoder_dtype
from workers.clip_sets import ClipRequest, sample_clip_set
from workers.clip_settings import VideoSettings
from workers.evaluator import Sampling
from workers.measured_clips import MeasuredClips
from workers.set_measures import motion_figures
from workers.settings import ModelSettings

MANY_STEPS = 30
FEW_STEPS = 4
_CAPTION_SEED = 9_001


def measured(model: Path, num_clips: int, num_floors: int, guidance: float | None) -> dict:
    """Sets of clips, measured, by name; `truth` is rendered."""
    world = embedded_world(WorldName.OPEN)
    pixels, captions = world.draw(_CAPTION_SEED, range(num_clips), ClipSplit.HELD_OUT)
    settings = read_inference_settings(model)
    scale = guidance or settings.guidance_scale
    subject = Subject(
        folder=model,
        model=ModelSettings(
            str(model), settings.text_length, settings.negative_prompt, encoder_dtype()
        ),
        video=VideoSettings(settings.num_frames, settings.height, settings.width, settings.fps),
        schedule=settings.schedule,
    )
    evaluator = subject.evaluator(EvaluationOptions(batch_size=32, num_threads=1))
    reference = Sampling(MANY_STEPS, scale, seed=0)
    few = Sampling(FEW_STEPS, scale, seed=1)
    samplings = {
        "reference": reference,
        **{f"floor {seed}": replace(reference, seed=seed) for seed in range(1, 1 + num_floors)},
        "few guided": few,
        "few unguided": replace(few, guidance_scale=1.0),
        "many unguided": Sampling(MANY_STEPS, 1.0, seed=1),
    }
    request = ClipRequest(tuple(captions), reference, 32, settings.fps, world.name)
    found = {"truth": of_video(torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 255)}
    for name, sampling in samplings.items():
        found[name] = sample_clip_set(evaluator, request.sampled(sampling)).clips
        print(name, "sampled", flush=True)
    return {"captions": captions, "sets": found}


def of_video(video: Tensor) -> MeasuredClips:
    """Numbers of clips that are there already."""
    return MeasuredClips(clip_features(video), {}, read_clips(WorldName.OPEN, video))


def compared(own: MeasuredClips, reference: MeasuredClips) -> dict[str, float]:
    """Every distance of a set to the reference, and what it says of its captions."""
    moments = [fit_gaussian(each.features) for each in (own, reference)]
    figures = motion_figures(motion_of(own.reading), motion_of(reference.reading))
    return {"frechet": frechet_distance(*moments[0], *moments[1]), **figures}


def rows(sets: Mapping[str, MeasuredClips], captions: list[str]) -> dict[str, dict[str, float]]:
    """Figures by set, and ratios to the mean over the floors as `NAME/floor`."""
    found = {name: compared(clips, sets["reference"]) for name, clips in sets.items()}
    floors = [values for name, values in found.items() if name.startswith("floor")]
    floor = {name: mean(values[name] for values in floors) for name in floors[0]}
    for name, values in found.items():
        ratios = {
            f"{figure}/floor": value / floor[figure]
            for figure, value in values.items()
            if figure == "frechet" or figure.endswith("_distance")
            if floor[figure]
        }
        scores = score_reading(sets[name].reading, captions)
        speeds = motion_of(sets[name].reading).speeds
        values |= ratios | {
            "colour": scores.colour,
            "shape": scores.shape,
            "direction": scores.direction,
            "count": scores.count,
            "mean_speed": float(speeds.mean()),
            "texture": float(sets[name].reading.texture.mean()),
        }
    return found


def main() -> None:
    """Measures a model folder, prints a table and writes all figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--floors", type=int, default=3)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(given.model, given.clips, given.floors, given.guidance)
    table = rows(found["sets"], found["captions"])
    names = list(table["reference"])
    print("| set | " + " | ".join(names) + " |")
    for name, values in table.items():
        print(f"| {name} | " + " | ".join(f"{values.get(each, 0):.3f}" for each in names) + " |")

    if given.output:
        write_json(str(given.output), table)


if __name__ == "__main__":
    main()
