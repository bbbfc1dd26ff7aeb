"""Where things are and when they end on a GPU; what they compute there: benchmarks/gpu_check.py."""

from pathlib import Path

import pytest
import torch

from cluster.local import LocalWorkerGroup
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import MicroBatchKey
from workers.build import build_fake_score, build_generator, build_teacher, build_text_encoder
from workers.clip_settings import VideoSettings
from workers.settings import FakeScoreSettings, GeneratorSettings, ModelSettings, TeacherSettings

MODEL = ModelSettings(str(Path(__file__).parents[2] / "assets" / "tiny-wan"), text_length=16)
VIDEO = VideoSettings(num_frames=13, height=32, width=32, fps=8)
CAPTIONS = ("a red circle moves left quickly", "a blue square moves up slowly")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is in sight"),
]


def test_roles_hand_on_what_lies_on_the_gpu_and_the_draws_of_a_cpu():
    generator = build_generator(MODEL, VIDEO, FlowMatchSchedule(), GeneratorSettings(), 0, 1)
    fake_score = build_fake_score(MODEL, SgmdObjective(), FakeScoreSettings(), 1)
    teacher = build_teacher(MODEL, TeacherSettings(), 1)
    text = build_text_encoder(MODEL, 1)
    batch, negative = text.encode(CAPTIONS, (0, 1)), text.encode_negative("")
    key = MicroBatchKey(0, 0)
    query = generator.rollout(key, batch)
    prediction = teacher.denoise(query, negative)
    signal = fake_score.signal(query, prediction, 1.0)
    assert {value.device.type for value in (query.x0, prediction.velocity, signal.grad_x0)} == {
        "cuda"
    }
    start = generator.start(key, batch)
    again = torch.Generator().manual_seed(0)
    assert start.noise.device.type == "cuda"
    assert again.device.type == "cpu"
    assert torch.equal(generator.start(key, batch).noise.cpu(), start.noise.cpu())


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path):
    generator = build_generator(MODEL, VIDEO, FlowMatchSchedule(), GeneratorSettings(), 0, 1)
    generator.save(str(tmp_path))
    loaded = build_generator(MODEL, VIDEO, FlowMatchSchedule(), GeneratorSettings(), 0, 1)
    assert loaded.load(str(tmp_path)) == 0
    for name, value in generator.trained_weights().items():
        assert torch.equal(loaded.trained_weights()[name], value)


class Busy:
    """Gives the GPU more to do than a call takes to return."""

    def work(self) -> float:
        found = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            found = found @ found / 4096
        return 0.0


def test_a_call_of_this_process_ends_when_the_gpu_has():
    group = LocalWorkerGroup("busy", [Busy()])
    group.call_rank(0, Busy.work)
    assert torch.cuda.current_stream().query()
