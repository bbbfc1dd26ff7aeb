"""Cost of few steps for a teacher of the world `open`, in floors.

    python benchmarks/open_world.py MODEL --clips 256 512 --floors 5 --kept FOLDER

Samples the teacher in many guided steps, from several seeds, and in few steps, and compares sets:
Frechet distance, and the distributions of `workers.set_measures`. Each set of many guided steps is
the reference in turn, and a distance is the mean over them.

    floor    mean distance between two sets of many guided steps
    ratio    distance / floor
    spreads  (distance - floor) / standard deviation of the distances behind the floor

A floor shrinks with the number of clips and a true distance does not, so ratios at different
numbers of clips differ; distance - floor depends on it by chance only. Smaller numbers of
clips are the first ones of the largest set, so all of them cost one. Clips rendered by the world
itself, with the same captions, stand beside them: how far the teacher is from what it has learnt.

Sets in the folder `--kept` are not sampled again: after an interruption the same command goes on.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from cluster.storage import write_json
from pipelines.embedded_worlds import embedded_world
from pipelines.evaluation.plan import EvaluationOptions, Subject
from pipelines.media.inference import read_inference_settings
from pipelines.shapes import ClipSplit
from sgmd_core.metrics.frechet import clip_features, fit_gaussian, frechet_distance
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.open_shapes import OpenReading
from sgmd_core.worlds.readings import motion_of, read_clips, score_reading
from workers.build import encoder_dtype
from workers.clip_sets import ClipRequest, sample_clip_set
from workers.clip_settings import VideoSettings
from workers.kept_clips import KeptClips
from workers.measured_clips import MeasuredClips
from workers.models.content import model_digests
from workers.samplings import Sampling
from workers.set_measures import motion_figures
from workers.settings import ModelSettings

MANY_STEPS = 30
FEW_STEPS = 4
_CAPTION_SEED = 9_001
_BATCH_SIZE = 32
# Words of a clip and of its caption that are a share of right ones.
_SCORES = ("colour", "shape", "direction", "pace", "verb", "count")

Figures = dict[str, float]


def ways_of_sampling(num_floors: int, scale: float) -> dict[str, Sampling]:
    """Every set that is sampled, by name."""
    few_seed = 1 + num_floors
    few = Sampling(FEW_STEPS, scale, few_seed)
    return {
        **{f"many guided {seed}": Sampling(MANY_STEPS, scale, seed) for seed in range(few_seed)},
        "few guided": few,
        "few unguided": replace(few, guidance_scale=1.0),
        "many unguided": Sampling(MANY_STEPS, 1.0, few_seed),
    }


def measured(
    model: Path, num_clips: int, num_floors: int, guidance: float | None, kept_in: Path
) -> tuple[dict[str, MeasuredClips], list[str]]:
    """Sets of clips, measured, by name, and their captions; the set `truth` is rendered."""
    world = embedded_world(WorldName.OPEN)
    pixels, captions = world.draw(_CAPTION_SEED, range(num_clips), ClipSplit.HELD_OUT)
    settings = read_inference_settings(model)
    subject = Subject(
        folder=model,
        model=ModelSettings(
            str(model), settings.text_length, settings.negative_prompt, encoder_dtype()
        ),
        video=VideoSettings(settings.num_frames, settings.height, settings.width, settings.fps),
        schedule=settings.schedule,
    )
    evaluator = subject.evaluator(EvaluationOptions(batch_size=_BATCH_SIZE, num_threads=1))
    kept = KeptClips(str(kept_in), json.dumps(model_digests(model)), subject.facts)
    samplings = ways_of_sampling(num_floors, guidance or settings.guidance_scale)
    found = {"truth": of_video(torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 255)}
    for name, sampling in samplings.items():
        request = ClipRequest(tuple(captions), sampling, _BATCH_SIZE, settings.fps, world.name)
        clips = kept.get(request, lambda wanted: sample_clip_set(evaluator, wanted))
        found[name] = clips.clips
        print(name, "kept" if clips.remembered else "sampled", flush=True)
    return found, captions


def of_video(video: Tensor) -> MeasuredClips:
    """Numbers of clips that are there already."""
    return MeasuredClips(clip_features(video), {}, read_clips(WorldName.OPEN, video))


def first_of(clips: MeasuredClips, count: int) -> MeasuredClips:
    """The first clips of a set."""
    reading = clips.reading
    assert reading is not None, "every set is of an embedded world"
    cut = {each.name: getattr(reading, each.name)[:count] for each in fields(reading)}
    return MeasuredClips(clips.features[:count], {}, type(reading)(**cut))


def read(clips: MeasuredClips) -> OpenReading:
    """Readings of clips of the open world."""
    assert isinstance(clips.reading, OpenReading)
    return clips.reading


def distances(own: MeasuredClips, reference: MeasuredClips) -> Figures:
    """Every distance of a set to another, by name."""
    moments = [fit_gaussian(each.features) for each in (own, reference)]
    figures = motion_figures(motion_of(read(own)), motion_of(read(reference)))
    named = {name: value for name, value in figures.items() if name.endswith("_distance")}
    return {"frechet": frechet_distance(*moments[0], *moments[1]), **named}


def shown(own: MeasuredClips, captions: list[str]) -> Figures:
    """Means over the clips of a set, and the share that is as their captions say."""
    reading = read(own)
    motion, scores = motion_of(reading), score_reading(reading, captions)
    return {
        "still_share": motion_figures(motion, motion)["still_share"],
        "mean_speed": float(motion.speeds.mean()),
        "texture": float(reading.texture.mean()),
        **{name: getattr(scores, name) for name in _SCORES},
    }


def table(sets: Mapping[str, MeasuredClips], captions: list[str]) -> dict[str, Figures]:
    """Figures by set: distances, and as NAME/floor and NAME/spread what the top of this file says.

    The row `floor` has the floors, and as NAME/spread the standard deviations behind them.
    """
    references = {name: clips for name, clips in sets.items() if name.startswith("many guided")}
    pairs = [distances(*pair) for pair in combinations(references.values(), 2)]
    floor = {name: mean(pair[name] for pair in pairs) for name in pairs[0]}
    spread = {name: stdev(pair[name] for pair in pairs) for name in pairs[0]}
    found: dict[str, Figures] = {
        "floor": floor | {f"{name}/spread": value for name, value in spread.items()}
    }
    for name, clips in sets.items():
        others = [distances(clips, each) for each in references.values() if each is not clips]
        own = {figure: mean(other[figure] for other in others) for figure in floor}
        found[name] = {
            **own,
            **{f"{each}/floor": own[each] / floor[each] for each in own},
            **{f"{each}/spread": (own[each] - floor[each]) / spread[each] for each in own},
            **shown(clips, captions),
        }
    return found


def print_table(count: int, rows: Mapping[str, Figures]) -> None:
    """Prints a table in Markdown."""
    names = list(rows["few guided"])
    print(f"\n{count} clips\n\n| set | " + " | ".join(names) + " |")
    for name, values in rows.items():
        cells = [f"{values[each]:.4f}" if each in values else "" for each in names]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Measures a model folder, prints a table for each number of clips and writes all figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=int, nargs="+", default=[256])
    parser.add_argument("--floors", type=int, default=5)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--kept", type=Path, default=Path("runs/open-world-sets"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.floors < 2:
        parser.error("--floors: at least 2, whose spread is asked for")
    torch.set_num_threads(1)
    most = max(given.clips)
    sets, captions = measured(given.model, most, given.floors, given.guidance, given.kept)
    found: dict[int, dict[str, Figures]] = {}
    for count in given.clips:
        first = {name: first_of(clips, count) for name, clips in sets.items()}
        found[count] = table(first, captions[:count])
        print_table(count, found[count])
    if given.output:
        write_json(str(given.output), {str(num): figures for num, figures in found.items()})


if __name__ == "__main__":
    main()
