"""One stage of a pretraining under Ray Train."""

from collections.abc import Callable, Mapping
from typing import Any

from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.ray.processes import end_actor
from cluster.stores import store_address
from pipelines.pretraining.config import RayTrainSettings
from pipelines.run.ray_store import ray_store
from sgmd_core.errors import SgmdError


def fit_stage(
    loop: Callable[[dict[str, Any]], None],
    settings: Mapping[str, Any],
    name: str,
    place: str,
    workers: RayTrainSettings,
) -> Result:
    """Runs one stage under Ray Train; the same name and place continue an earlier attempt.

    Args:
        loop: Training loop of a worker.
        settings: Argument of the loop.
        name: Name of the stage.
        place: Folder of Ray Train's checkpoints: a path or an address.
        workers: Number and size of the workers, checkpoints and failures.

    Raises:
        SgmdError: The error that made the workers fail, if it is one.
    """
    files = None
    if store_address(place):
        files, place = ray_store(place)
    trainer = _Trainer(
        loop,
        train_loop_config=dict(settings),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            resources_per_worker={"CPU": workers.cpus_per_worker},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=place,
            storage_filesystem=files,
            checkpoint_config=CheckpointConfig(num_to_keep=workers.checkpoints_to_keep),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        return trainer.fit()
    except WorkerGroupError as error:
        raise _own_error(error) or error from error
    except BaseException:
        trainer.end()
        raise


class _Trainer(TorchTrainer):
    """Ray's trainer, which leaves Ctrl-C to the process that runs it."""

    _controller: ActorHandle | None = None

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Registers none: Ray's waits for its controller, and stays after the training has ended.

        Then a Ctrl-C while the model is written and measured, or in Ray's next stage, has no
        effect.
        """
        self._controller = controller

    def end(self) -> None:
        """Ends the controller, which would train on, its workers and what it has reserved.

        A process that keeps Ray, such as a notebook's, would otherwise begin its next training in
        the same folder beside them.
        """
        if self._controller is not None:
            end_actor(self._controller, "abort")


def _own_error(error: WorkerGroupError) -> SgmdError | None:
    """The error of this program that made the workers fail, if it was one."""
    for failure in error.worker_failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, SgmdError):
                return cause
            cause = cause.__cause__
    return None
