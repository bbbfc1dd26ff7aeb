"""Clips of a few-step generator under other schedulers of diffusers, beside those of its own.

    python benchmarks/schedulers.py runs/demo/generator

The same prompts and noise, in the pipeline that users load; JSON on standard output. Differences
are means over pixels, of 255; `another prompt` says how far apart different clips are.
"""

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)

from pipelines.media.inference import InferenceSettings, read_inference_settings
from pipelines.run.generator_folder import model_folder
from pipelines.shapes import ClipSplit, captions

_NUM_PROMPTS, _NUM_SEEDS = 6, 4


def main() -> None:
    """Sample and compare."""
    parser = argparse.ArgumentParser(description="Compare schedulers of diffusers.")
    parser.add_argument("model", help="a run, or the folder of its generator")
    folder = model_folder(parser.parse_args().model)
    settings = read_inference_settings(folder)
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    shift = settings.flow_shift
    multistep: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    schedulers = {
        "as exported": pipeline.scheduler,
        "UniPCMultistepScheduler": UniPCMultistepScheduler(**multistep),
        "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(**multistep),
        "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    made = {name: _clips(pipeline, each, settings) for name, each in schedulers.items()}
    own = made.pop("as exported")
    shifted = np.roll(own, _NUM_SEEDS, axis=0)
    result = {
        "shift": shift,
        "num_steps": settings.num_steps,
        "clips": len(own),
        "mean_difference": {name: _difference(own, clips) for name, clips in made.items()},
        "another_prompt": _difference(own, shifted),
    }
    print(json.dumps(result, indent=2))


def _clips(pipeline: Any, scheduler: Any, settings: InferenceSettings) -> np.ndarray:  # noqa: ANN401
    pipeline.scheduler = scheduler
    every = captions(ClipSplit.HELD_OUT)
    prompts = every[:: len(every) // _NUM_PROMPTS][:_NUM_PROMPTS]
    return np.stack(
        [
            pipeline(
                prompt,
                num_inference_steps=settings.num_steps,
                guidance_scale=1.0,
                num_frames=settings.num_frames,
                height=settings.height,
                width=settings.width,
                max_sequence_length=settings.text_length,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).frames[0]
            for prompt, seed in itertools.product(prompts, range(_NUM_SEEDS))
        ]
    )


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return round(float(np.abs(one - other).mean() * 255), 3)


if __name__ == "__main__":
    main()
