import pytest
import torch

from sgmd_core.velocity import Guidance, guided_velocity
from sgmd_core.worlds.gaussian import GaussianVelocity, gaussian_text

NEGATIVE = gaussian_text(torch.zeros(1).double(), torch.ones(1).double())


def guided(model, inputs, scale, *, batched=True):
    return guided_velocity(model, **inputs, guidance=Guidance(NEGATIVE, scale, batched))


class CountingModel:
    """The exact Gaussian, and the sizes of the batches that it was called with."""

    def __init__(self):
        self.batch_sizes = []

    def __call__(self, x_t, sigma, text):
        self.batch_sizes.append(len(x_t))
        return GaussianVelocity()(x_t, sigma, text)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "x_t": torch.randn(3, 2, 1, 4, 4, dtype=torch.float64, generator=generator),
        "sigma": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        "text": gaussian_text(
            torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
        ),
    }


def test_guidance_in_one_batch_equals_two_passes(inputs):
    model = GaussianVelocity()
    conditional = model(inputs["x_t"], inputs["sigma"], inputs["text"])
    unconditional = model(inputs["x_t"], inputs["sigma"], NEGATIVE.expand(3, -1, -1))
    found = guided(model, inputs, 3.0)
    torch.testing.assert_close(found, unconditional + 3.0 * (conditional - unconditional))


def test_guidance_costs_one_call_of_twice_the_batch_and_scale_one_nothing(inputs):
    model = CountingModel()
    guided(model, inputs, 3.0)
    guided(model, inputs, 1.0)
    assert model.batch_sizes == [6, 3]


def test_guidance_in_two_passes_makes_the_same_of_smaller_batches(inputs):
    model = CountingModel()
    apart = guided(model, inputs, 3.0, batched=False)
    assert model.batch_sizes == [3, 3]
    torch.testing.assert_close(apart, guided(model, inputs, 3.0))


def test_scale_one_is_the_caption_alone_and_scale_zero_the_negative_one(inputs):
    model = GaussianVelocity()
    conditional = model(inputs["x_t"], inputs["sigma"], inputs["text"])
    unconditional = model(inputs["x_t"], inputs["sigma"], NEGATIVE.expand(3, -1, -1))
    assert torch.equal(guided(model, inputs, 1.0), conditional)
    assert torch.equal(guided(model, inputs, 0.0), unconditional)
