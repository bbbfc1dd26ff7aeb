"""Attention that holds all pairs of tokens, and derivatives in forward mode: planned as counted."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.config.recipe import load_recipe
from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.planning.kept_bytes import pair_bytes
from pipelines.planning.memory import derivative_bytes, generator_memory, teacher_memory
from pipelines.planning.traffic import exchanged_bytes
from pipelines.planning.workload import Workload
from pipelines.stages.kind import IterationKind
from tests.helpers.live_bytes import LiveBytes
from tests.workers.test_wan_arithmetic import network
from workers.compute import prepare_network
from workers.models.wan_arithmetic import WanShape
from workers.network_settings import ComputeSettings
from workers.tangents import velocity_and_derivative

TEXT_LENGTH = 16
MANY = (4, 3, 32, 32)
"""768 tokens: there all pairs are more than the stream."""
NEAR = 0.15


def shape_of(width: int = 64, ffn_width: int = 160, head_size: int = 16) -> WanShape:
    return WanShape(2, width, ffn_width, 24, 16, 4, 4, num_heads=width // head_size)


def work_of(shape: WanShape, latents: tuple[int, int, int, int], **settings) -> Workload:
    plain = Workload(
        shape, latents, TEXT_LENGTH, 1, bf16=frozenset(), checkpointing=frozenset(), guided=False
    )
    return replace(plain, **settings)


def inputs(latents: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(1, *latents), torch.tensor([0.5]), torch.randn(1, TEXT_LENGTH, 24)


def peak_of(compute: Callable[[], object]) -> int:
    with warnings.catch_warnings(), LiveBytes() as live:
        warnings.simplefilter("ignore")
        compute()
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "latents"),
    [
        ((64, 160, 16), MANY),
        ((128, 320, 64), (4, 3, 32, 16)),
        # There the feed-forward part is the widest place.
        ((256, 1024, 256), (4, 3, 16, 16)),
    ],
)
def test_a_derivative_in_forward_mode_takes_what_is_planned(sizes, latents):
    shape = shape_of(*sizes)
    made, (x_t, sigma, text) = network(shape, sizes[2]), inputs(latents)
    direction = torch.randn_like(x_t), torch.ones(1)
    counted = peak_of(lambda: velocity_and_derivative(made, x_t, sigma, text, direction))
    work = work_of(shape, latents, kind=IterationKind(consistency=True))
    assert derivative_bytes(work, GENERATOR) == pytest.approx(counted, rel=NEAR)
    plain = work_of(shape, latents)
    # By far more than the tolerance.
    assert generator_memory(work, 1, 1, 1).working > 2.5 * generator_memory(plain, 1, 1, 1).working


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_attention_of_all_pairs_takes_what_is_planned(bf16):
    shape = shape_of()
    compute = ComputeSettings("bf16" if bf16 else "fp32", attention="_native_math")
    made, given = prepare_network(network(shape, 16), compute), inputs(MANY)
    roles = frozenset(ROLES if bf16 else ())
    work = work_of(shape, MANY, bf16=roles, all_pairs=frozenset(ROLES))
    with torch.no_grad():
        counted = peak_of(lambda: made(*given))
    assert teacher_memory(work, 1, 1).working == pytest.approx(counted, rel=NEAR)
    again = prepare_network(network(shape, 16), replace(compute, checkpointing=True))
    checkpointed = replace(work, checkpointing=frozenset(ROLES))
    for each, planned in ((made, work), (again, checkpointed)):
        counted = peak_of(lambda each=each: each(*given).sum().backward())
        memory = generator_memory(planned, 1, 1, 1)
        # Gradients are counted with the state, of which there is more than these.
        gradients = 4 * shape.num_parameters
        assert memory.graphs + memory.working + gradients == pytest.approx(counted, rel=0.2)
        plain = generator_memory(replace(planned, all_pairs=frozenset()), 1, 1, 1)
        assert memory.graphs + memory.working > 1.5 * (plain.graphs + plain.working)


def test_fused_kernels_hold_no_pairs():
    made, given = network(shape_of(), 16), inputs(MANY)
    with torch.no_grad():
        fused = peak_of(lambda: made(*given))
        with sdpa_kernel(SDPBackend.MATH):
            plain = peak_of(lambda: made(*given))
    assert plain > 2 * fused
    assert teacher_memory(work_of(shape_of(), MANY), 1, 1).working < plain / 2


def test_a_recipe_says_who_holds_all_pairs():
    settings = ["fake_score.compute.attention=_native_math", "objective={method: rcm}"]
    settings += ["schedule.renoise=true", "fake_score.tracking=fresh"]
    work = Workload.of(load_recipe("wan21-1.3b", settings), "1.3b")
    assert work.all_pairs == {FAKE_SCORE}
    assert work.kind.consistency
    pairs = 4 * 12 * 32760**2
    assert pair_bytes(work, TEACHER) == pairs
    assert generator_memory(work, 1, 1, 1).working > 5 * pairs


def test_ranks_that_work_together_exchange_what_is_counted():
    """Four tensors a layer and way; tests/workers/test_sequence.py counts them on two ranks."""
    work = work_of(shape_of(), MANY, ulysses=((FAKE_SCORE, 2),))
    one = 2 * 4 * 4 * 768 * 64 / 2
    found = exchanged_bytes(work)
    # A pass forward and one to the input; the pass to the weights; nothing of other roles.
    assert found == {("fake_score", "signal"): 2 * one, ("fake_score", "track"): one}
    again = exchanged_bytes(replace(work, checkpointing=frozenset(ROLES)))
    assert again == {("fake_score", "signal"): 3 * one, ("fake_score", "track"): 2 * one}
