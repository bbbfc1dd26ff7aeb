"""Public interface of sgmd: Score Gradient Matching Distillation on Ray.

    mathematics   SgmdObjective and the other methods, the protocols that a method implements,
                  FlowMatchSchedule, RandomSteps, rollout, euler_sample
    formulas      matching_direction and the other pure functions that the methods are made of
    records       NoisedBatch, GeneratorSignal, Loss, MicroBatchKey
    worlds        GaussianVelocity, a teacher whose scores are exact
    models        ModelFamily, Denoiser, family_of
    programs      load_recipe, distill, evaluate, generate, pretrain, sweep, and their options
    data          Feed, StreamSettings, Source
    errors        SgmdError and the errors below it

Names that are not in `__all__` are private. A name is imported when it is first used, so the
mathematics needs neither Ray nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.errors import ClusterError as ClusterError
    from pipelines.config.methods import METHODS as METHODS
    from pipelines.config.recipe import DistillConfig as DistillConfig
    from pipelines.config.recipe import load_recipe as load_recipe
    from pipelines.data.stream.feed import Feed as Feed
    from pipelines.data.stream.feed import StreamSettings as StreamSettings
    from pipelines.data.stream.source import Source as Source
    from pipelines.distillation.run import distill as distill
    from pipelines.evaluation.plan import EvaluationOptions as EvaluationOptions
    from pipelines.evaluation.run import evaluate as evaluate
    from pipelines.generate import SamplingOptions as SamplingOptions
    from pipelines.generate import generate as generate
    from pipelines.pretraining.run import pretrain as pretrain
    from pipelines.sweeping.run import sweep as sweep
    from sgmd_core.errors import AlarmError as AlarmError
    from sgmd_core.errors import CheckpointError as CheckpointError
    from sgmd_core.errors import ConfigError as ConfigError
    from sgmd_core.errors import DataError as DataError
    from sgmd_core.errors import ModelFolderError as ModelFolderError
    from sgmd_core.errors import NonFiniteError as NonFiniteError
    from sgmd_core.errors import SgmdError as SgmdError
    from sgmd_core.errors import ShapeError as ShapeError
    from sgmd_core.errors import StaleCallError as StaleCallError
    from sgmd_core.interval import interval_state as interval_state
    from sgmd_core.interval import interval_velocity as interval_velocity
    from sgmd_core.objectives import AdversarialObjective as AdversarialObjective
    from sgmd_core.objectives import GradientPath as GradientPath
    from sgmd_core.objectives import LookingObjective as LookingObjective
    from sgmd_core.objectives import Objective as Objective
    from sgmd_core.objectives import PhasingObjective as PhasingObjective
    from sgmd_core.objectives import SteppingObjective as SteppingObjective
    from sgmd_core.objectives.adm import AdmObjective as AdmObjective
    from sgmd_core.objectives.adversarial import AdversarialTerm as AdversarialTerm
    from sgmd_core.objectives.cdm import CdmObjective as CdmObjective
    from sgmd_core.objectives.consistency import ConsistencyTerm as ConsistencyTerm
    from sgmd_core.objectives.consistency import ConsistentObjective as ConsistentObjective
    from sgmd_core.objectives.diversity import anchor_velocity as anchor_velocity
    from sgmd_core.objectives.diversity import diversity_loss as diversity_loss
    from sgmd_core.objectives.dmd import DmdObjective as DmdObjective
    from sgmd_core.objectives.dmd import denoising_loss as denoising_loss
    from sgmd_core.objectives.dmd import distribution_matching_loss as distribution_matching_loss
    from sgmd_core.objectives.dmd import matching_direction as matching_direction
    from sgmd_core.objectives.dmd2 import Dmd2Objective as Dmd2Objective
    from sgmd_core.objectives.meanflow import FlowObjective as FlowObjective
    from sgmd_core.objectives.pdmd import PdmdObjective as PdmdObjective
    from sgmd_core.objectives.phased import PhasedObjective as PhasedObjective
    from sgmd_core.objectives.rcm import RcmObjective as RcmObjective
    from sgmd_core.objectives.sgmd import SgmdObjective as SgmdObjective
    from sgmd_core.objectives.sid import SidObjective as SidObjective
    from sgmd_core.objectives.tmd import TmdObjective as TmdObjective
    from sgmd_core.objectives.tsg_fisher import TsgFisherObjective as TsgFisherObjective
    from sgmd_core.objectives.tsg_sim import TsgSimObjective as TsgSimObjective
    from sgmd_core.rollout import anchored as anchored
    from sgmd_core.rollout import euler_sample as euler_sample
    from sgmd_core.rollout import extrapolated as extrapolated
    from sgmd_core.rollout import rollout as rollout
    from sgmd_core.rollout import rollout_exit as rollout_exit
    from sgmd_core.schedule import FlowMatchSchedule as FlowMatchSchedule
    from sgmd_core.schedule import RandomSteps as RandomSteps
    from sgmd_core.schedule import shift_sigma as shift_sigma
    from sgmd_core.types import GeneratorSignal as GeneratorSignal
    from sgmd_core.types import Loss as Loss
    from sgmd_core.types import MicroBatchKey as MicroBatchKey
    from sgmd_core.types import NoisedBatch as NoisedBatch
    from sgmd_core.velocity import VelocityModel as VelocityModel
    from sgmd_core.velocity import guided_velocity as guided_velocity
    from sgmd_core.velocity import renormalized as renormalized
    from sgmd_core.worlds.gaussian import GaussianVelocity as GaussianVelocity
    from sgmd_core.worlds.gaussian import gaussian_text as gaussian_text
    from workers.models.families import family_of as family_of
    from workers.models.family import Denoiser as Denoiser
    from workers.models.family import ModelFamily as ModelFamily

# The same names as above, for the running program; a test compares the two lists.
NAMES_BY_MODULE = {
    "cluster.errors": ("ClusterError",),
    "pipelines.config.methods": ("METHODS",),
    "pipelines.config.recipe": ("DistillConfig", "load_recipe"),
    "pipelines.data.stream.feed": ("Feed", "StreamSettings"),
    "pipelines.data.stream.source": ("Source",),
    "pipelines.distillation.run": ("distill",),
    "pipelines.evaluation.plan": ("EvaluationOptions",),
    "pipelines.evaluation.run": ("evaluate",),
    "pipelines.generate": ("SamplingOptions", "generate"),
    "pipelines.pretraining.run": ("pretrain",),
    "pipelines.sweeping.run": ("sweep",),
    "sgmd_core.errors": (
        "AlarmError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "ModelFolderError",
        "NonFiniteError",
        "SgmdError",
        "ShapeError",
        "StaleCallError",
    ),
    "sgmd_core.interval": ("interval_state", "interval_velocity"),
    "sgmd_core.objectives": (
        "AdversarialObjective",
        "GradientPath",
        "LookingObjective",
        "Objective",
        "PhasingObjective",
        "SteppingObjective",
    ),
    "sgmd_core.objectives.adm": ("AdmObjective",),
    "sgmd_core.objectives.adversarial": ("AdversarialTerm",),
    "sgmd_core.objectives.cdm": ("CdmObjective",),
    "sgmd_core.objectives.consistency": ("ConsistencyTerm", "ConsistentObjective"),
    "sgmd_core.objectives.diversity": ("anchor_velocity", "diversity_loss"),
    "sgmd_core.objectives.dmd": (
        "DmdObjective",
        "denoising_loss",
        "distribution_matching_loss",
        "matching_direction",
    ),
    "sgmd_core.objectives.dmd2": ("Dmd2Objective",),
    "sgmd_core.objectives.meanflow": ("FlowObjective",),
    "sgmd_core.objectives.pdmd": ("PdmdObjective",),
    "sgmd_core.objectives.phased": ("PhasedObjective",),
    "sgmd_core.objectives.rcm": ("RcmObjective",),
    "sgmd_core.objectives.sgmd": ("SgmdObjective",),
    "sgmd_core.objectives.sid": ("SidObjective",),
    "sgmd_core.objectives.tmd": ("TmdObjective",),
    "sgmd_core.objectives.tsg_fisher": ("TsgFisherObjective",),
    "sgmd_core.objectives.tsg_sim": ("TsgSimObjective",),
    "sgmd_core.rollout": ("anchored", "euler_sample", "extrapolated", "rollout", "rollout_exit"),
    "sgmd_core.schedule": ("FlowMatchSchedule", "RandomSteps", "shift_sigma"),
    "sgmd_core.types": ("GeneratorSignal", "Loss", "MicroBatchKey", "NoisedBatch"),
    "sgmd_core.velocity": ("VelocityModel", "guided_velocity", "renormalized"),
    "sgmd_core.worlds.gaussian": ("GaussianVelocity", "gaussian_text"),
    "workers.models.families": ("family_of",),
    "workers.models.family": ("Denoiser", "ModelFamily"),
}
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
