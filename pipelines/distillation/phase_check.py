"""Check that a generator has an expert for each phase of its training."""

from pipelines.config.recipe import DistillConfig
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import phases_of
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.folder import ModelFolder


def check_phases(config: DistillConfig, model: ModelFolder) -> None:
    """Check that the experts of the generator's model change where the phases do.

    A step goes to the first expert if its noise level is at least the model's boundary, as in
    diffusers. So the boundary has to lie between the last step of the high phase and the first one
    of the low phase.

    Args:
        config: The run.
        model: The generator's model.

    Raises:
        ConfigError: The model has one denoiser, or its experts change at another step.
    """
    phases = phases_of(config.objective, config.schedule, config.generator.num_steps)
    if phases is None:
        return
    grid = config.schedule.generator_grid(config.generator.num_steps)
    above, below = (float(grid[phases.high.end - back]) for back in (1, 0))
    middle = round((above + below) / 2, 4)
    attempted = f"checking the experts of {model.path}"
    expected = f"two experts that change above {below:.6g} and at most at {above:.6g}"
    remedy = (
        f"`sgmd experts {model.path} DST --boundary {middle}` makes a folder of two, for "
        "model.folder; the teacher can stay where it is: teacher.model"
        if model.layout.experts
        else f"`sgmd experts {model.path} DST --boundary {middle}` makes a folder of two, for "
        "model.folder"
    )
    if not model.layout.experts:
        raise ConfigError(
            attempted,
            f"one denoiser, of which objective.method={config.objective.method} would train the "
            "low phase over the high one",
            expected,
            remedy,
        )
    boundary = float(read_model_json(model.path / INDEX_FILE)["boundary_ratio"])
    if not below < boundary <= above:
        raise ConfigError(attempted, f"experts that change at {boundary}", expected, remedy)
