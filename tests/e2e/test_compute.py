"""How a recipe's roles compute is a setting of theirs, and changes the rounding alone."""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters

from pipelines.distillation.run import distill
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers.moves import assert_moves

ROLES = ("generator", "fake_score", "teacher")


def everywhere(setting: str) -> list[str]:
    return [f"{role}.compute.{setting}" for role in ROLES]


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["shared", "fresh"])
def test_activations_made_again_change_no_bit(make_recipe: MakeRecipe, tracking: str):
    settings = ["iterations=2", f"fake_score.tracking={tracking}"]
    plain = make_recipe("name=plain", *settings)
    again = make_recipe("name=again", *settings, *everywhere("checkpointing=true"))
    other = make_recipe("name=other", *settings, "seed=1")
    for config in (plain, again, other):
        distill(config)
    if tracking == "shared":
        joint = make_recipe(
            "name=joint", *settings, *everywhere("checkpointing=true"), "fake_score.walk=joint"
        )
        distill(joint)
        assert joint.digest == plain.digest
        assert history(joint) == history(plain)
        assert state(joint, 2) == state(plain, 2)
    # Gradients that were computed from other activations would differ.
    assert_moves(moments(plain, 2), moments(other, 2))
    assert again.digest == plain.digest
    assert history(again) == history(plain)
    assert state(again, 2) == state(plain, 2)


@pytest.mark.slow
def test_bfloat16_products_round_losses_a_little(make_recipe: MakeRecipe):
    plain = make_recipe("name=plain", "iterations=2")
    rounded = make_recipe("name=rounded", "iterations=2", *everywhere("precision=bf16"))
    distill(plain)
    distill(rounded)
    assert rounded.digest != plain.digest
    for ours, theirs in zip(history(rounded), history(plain), strict=True):
        assert ours["losses"] != theirs["losses"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=0.05)


@pytest.mark.slow
def test_guidance_in_two_passes_changes_rounding_alone(make_recipe: MakeRecipe):
    # Diversity, so that the teacher's steps are guided too.
    settings = [
        "iterations=2",
        "generator.diversity={weight: 0.1, teacher_steps: 3, anchor_step: 2}",
    ]
    plain = make_recipe("name=plain", *settings)
    apart = make_recipe("name=apart", *settings, "teacher.batched_guidance=false")
    distill(plain)
    distill(apart)
    for number, without in enumerate(("teacher.guidance_scale=1", "generator.diversity.weight=0")):
        other = make_recipe(f"name=without-{number}", *settings, without)
        distill(other)
        losses, others = (history(config)[-1]["losses"] for config in (plain, other))
        assert_moves(losses, losses | others, 1e-4)
    for ours, theirs in zip(history(apart), history(plain), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


# torch.compile warns while it looks at tensors, and here warnings are errors.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_compiled_layers_run_in_a_recipe(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    # Inductor's C++ takes a minute, and `tests/workers/test_compute.py` has it: here the graphs of
    # AOT autograd run on PyTorch's own kernels.
    compiling = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    plain = make_recipe("name=plain", "iterations=1")
    compiled = make_recipe("name=compiled", "iterations=1", *everywhere("compile=true"))
    distill(plain)
    # What an earlier test of this process compiled would be used again.
    torch.compiler.reset()
    counters.clear()
    distill(compiled)
    assert counters["frames"]["ok"] > 0, "nothing was compiled"
    unguided = make_recipe("name=unguided", "iterations=1", "teacher.guidance_scale=1")
    distill(unguided)
    found, expected, other = (history(config)[0] for config in (compiled, plain, unguided))
    assert_moves(expected["losses"], other["losses"], 1e-3)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
