"""Causes of SGMD's break-up in 256 dimensions at high learning rates, one control at a time.

    python benchmarks/break_up.py
    python benchmarks/break_up.py --samples

The world `dim-256` of `sgmd study gaussians`, both rates 0.01, 12 seeds, 200 iterations, all seeds
side by side. A seed has broken up if it ends further than 1 from the truth in squared energy
distance, where the others end at 0.1 to 0.4. Controls change one thing each:

    lambda     weight of the negative residual
    tracking   who the fake score learns from, and how often
    beta2      memory of Adam, of both networks or of one
    sums       losses as sums over the dimensions, 256 times the means
    clipped    gradients of a seed's generator cut to twice their median of the last 50 iterations
    affine     a generator whose samples are Gaussian: tracked, or with their exact velocity in the
               place of the fake score's
    dmd        the same signal to the sample itself, not through the fake score's input

With `--samples`: which samples make the gradients jump from which the two broken seeds of the study
come, at the rates of its search; the share of the largest one in the sum of squares of a batch, its
length over the median, its noise level, and the exact posterior of its most likely mode.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from pipelines.config.gaussian_study import GaussianStudyConfig
from pipelines.config.recipe_files import load
from pipelines.study.gaussians.distilling import (
    GaussianDistillation,
    Member,
    measured_on_the_way,
    mixture_of,
    points,
)
from pipelines.study.gaussians.measuring import ENERGY, Truth
from pipelines.study.gaussians.networks import MemberAdam
from sgmd_core.types import Latents, PerSample, Purpose, Text, detached

WORLD = "dim-256"
RATE, BROKEN = 0.01, 1.0
GENERATOR, FAKE_SCORE = 0, 1
MANY = 1000
JUMPING, JUMPS = (6, 11, 0, 1), (429, 483)
"""Seeds, and iterations: 11 jumps at the first, 6 at the second, 0 and 1 stand beside them."""

Control = Callable[[GaussianDistillation], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table.

    Attributes:
        name: What is changed.
        objective: Settings of the objective.
        tracking: `shared` or `fresh`.
        control: Changes the distillation before it starts.
        affine: Without hidden layers in the generator.
    """

    name: str
    objective: str = "method: sgmd"
    tracking: str = "shared"
    control: Control = lambda distillation: None
    affine: bool = False


def before_steps(optimizer: MemberAdam, change: Callable[[list[Tensor]], None]) -> None:
    """Changes an optimizer's gradients before each of its steps."""
    step = optimizer.step

    def changed(multiple: float = 1.0) -> None:
        change([parameter.grad for parameter in optimizer._parameters])
        step(multiple)

    optimizer.step = changed


def remembering(beta2: float, *which: int) -> Control:
    """Another memory of Adam, of these networks."""

    def control(distillation: GaussianDistillation) -> None:
        for index in which:
            (group,) = distillation._optimizers[index]._adam.param_groups
            group["betas"] = (0.0, beta2)

    return control


def sums(distillation: GaussianDistillation) -> None:
    """Losses as sums over the dimensions."""
    for optimizer in distillation._optimizers:
        before_steps(optimizer, lambda gradients: [each.mul_(256) for each in gradients])


def clipped(distillation: GaussianDistillation) -> None:
    """Generators' gradients cut to twice their median, seed by seed."""
    lengths: list[Tensor] = []

    def cut(gradients: list[Tensor]) -> None:
        length = sum(each.square().sum(dim=(1, 2)) for each in gradients).sqrt()
        usual = torch.stack(lengths[-50:]).median(dim=0).values if len(lengths) > 9 else length
        lengths.append(length)
        factor = (2 * usual / length).clamp(max=1)[:, None, None]
        for each in gradients:
            each.mul_(factor)

    before_steps(distillation._optimizers[GENERATOR], cut)


def tracked_more(distillation: GaussianDistillation) -> None:
    """Four more updates of the fake scores after every iteration, on fresh samples."""
    iterate, optimizer = distillation.iterate, distillation._optimizers[FAKE_SCORE]

    def more(iteration: int) -> None:
        iterate(iteration)
        for update in range(MANY, MANY + 4):
            batch = distillation._draws.batch(iteration, Purpose.LAG, update)
            query = distillation._query(batch, keep_graph=False)
            velocity = distillation._fake_score(query.x_t, query.sigma, query.text)
            distillation._track(query, velocity)
            optimizer.step()

    distillation.iterate = more


class ExactFakeScore(nn.Module):
    """The velocity of what affine generators make now, in the place of networks that track them.

    Args:
        distillation: Of affine generators.
        tracked: Its fake scores, whose weights then get gradients of 0.
    """

    def __init__(self, distillation: GaussianDistillation, tracked: nn.Module) -> None:
        super().__init__()
        self._tracked, self._laws = tracked, distillation.affine_laws
        self.settle()

    def settle(self) -> None:
        """Takes up the present generators."""
        self._settled = [(mean, *torch.linalg.eigh(law)) for mean, law in self._laws()]

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Latents:
        """E[noise - x0 | x_t], in the eigenvectors of each covariance."""
        count, found = len(self._settled), []
        asked = points(x_t).double().chunk(count), sigma.double()[:, None].chunk(count)
        for x, s, (mean, values, vectors) in zip(*asked, self._settled, strict=True):
            variance, alpha = values.clamp_min(0), 1 - s
            gain = (s - alpha * variance) / (alpha.square() * variance + s.square())
            found.append((gain * ((x - alpha * mean) @ vectors)) @ vectors.T - mean)
        return torch.cat(found).reshape(x_t.shape).float() + 0 * self._tracked(x_t, sigma, text)


def exact(distillation: GaussianDistillation) -> None:
    """Puts the exact velocity in the place of the fake scores."""
    known = ExactFakeScore(distillation, distillation._fake_score)
    distillation._fake_score = known
    iterate = distillation.iterate

    def settled(iteration: int) -> None:
        known.settle()
        iterate(iteration)

    distillation.iterate = settled


CASES = (
    Case("sgmd"),
    Case("lambda 0", "method: sgmd, lambda_nr: 0.0"),
    Case("lambda 0.5", "method: sgmd, lambda_nr: 0.5"),
    Case("fresh", tracking="fresh"),
    Case("fresh, 5 updates", "method: sgmd, fake_updates: 5", "fresh"),
    Case("shared and 4 fresh", control=tracked_more),
    Case("sums", control=sums),
    Case("beta2 0.99", control=remembering(0.99, GENERATOR, FAKE_SCORE)),
    Case("beta2 0.9", control=remembering(0.9, GENERATOR, FAKE_SCORE)),
    Case("beta2 0.9, generator", control=remembering(0.9, GENERATOR)),
    Case("beta2 0.9, fake score", control=remembering(0.9, FAKE_SCORE)),
    Case("clipped", control=clipped),
    Case("affine, shared", affine=True),
    Case("affine, fresh, 5 updates", "method: sgmd, fake_updates: 5", "fresh", affine=True),
    Case("affine, exact", control=exact, affine=True),
    Case("dmd, shared", "method: dmd"),
    Case("dmd, fresh", "method: dmd", "fresh"),
)


def distances(case: Case, seeds: int, iterations: int) -> list[float]:
    """Energy distance of every seed at the end."""
    variant = f"{{objective: {{{case.objective}}}, tracking: {case.tracking}}}"
    settings = [f"variants={{sgmd: {variant}}}"]
    settings += ["networks.generator_layers=0"] if case.affine else []
    config = load(GaussianStudyConfig, "gaussians", settings)
    world = config.worlds[WORLD]
    members = [Member(seed, RATE, RATE) for seed in range(seeds)]
    distillation = GaussianDistillation(config, world, config.variants["sgmd"], members)
    case.control(distillation)
    ((_, samples),) = measured_on_the_way(distillation, iterations, 1, config.num_samples)
    truth = Truth(mixture_of(world), config.num_samples)
    pairs = zip(members, samples, strict=True)
    return [truth.figures(own, member.seed)[ENERGY] for member, own in pairs]


def largest_samples() -> None:
    """Prints, for two jumps, the sample with the largest gradient of each of four seeds."""
    config = load(GaussianStudyConfig, "gaussians", ["variants={sgmd: {}}"])
    world, variant = config.worlds[WORLD], config.variants["sgmd"]
    members = [Member(seed, 0.003, 0.01) for seed in JUMPING]
    distillation = GaussianDistillation(config, world, variant, members)
    print("iteration", "seed", "share", "over median", "sigma", "posterior", sep="\t")
    for iteration in range(max(JUMPS) + 1):
        if iteration in JUMPS:
            for seed, row in zip(JUMPING, _largest(distillation, iteration), strict=True):
                print(iteration, seed, *(f"{value:.2f}" for value in row), sep="\t", flush=True)
        distillation.iterate(iteration)


def _largest(distillation: GaussianDistillation, iteration: int) -> list[tuple[float, ...]]:
    """The gradient that the next iteration makes, by its largest sample in each member."""
    made = distillation._query(
        distillation._draws.batch(iteration, Purpose.GENERATE, 0), keep_graph=False
    )
    query = detached(made, x0=made.x0.detach().requires_grad_())
    teacher = distillation.teacher
    asked = query.x_t, query.sigma, query.text
    velocities = distillation._fake_score(*asked), teacher(*asked).detach()
    loss = distillation._objective.generator_loss(query, *velocities).value
    (gradient,) = torch.autograd.grad(loss, query.x0)
    # Centres have one length, which does not enter.
    alpha, sigma = 1 - query.sigma[:, None], query.sigma[:, None]
    variance = alpha.square() * teacher.spread**2 + sigma.square()
    logits = alpha * (points(query.x_t.detach()) @ teacher.centres.T) / variance
    posterior = torch.softmax(logits, dim=1).max(dim=1).values
    rows: list[tuple[float, ...]] = []
    per_member = (points(gradient).norm(dim=1), query.sigma, posterior)
    for lengths, levels, modes in zip(
        *(each.reshape(len(JUMPING), -1) for each in per_member), strict=True
    ):
        most = int(lengths.argmax())
        share = lengths[most].square() / lengths.square().sum()
        row = share, lengths[most] / lengths.median(), levels[most], modes[most]
        rows.append(tuple(value.item() for value in row))
    return rows


def main() -> None:
    """Prints a row a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("cases", nargs="*", help="names; default: all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.samples:
        largest_samples()
        return
    print("changed", "broken", "median", "most", sep="\t")
    for case in CASES:
        if given.cases and case.name not in given.cases:
            continue
        found = distances(case, given.seeds, given.iterations)
        broken = sum(not value <= BROKEN for value in found)
        row = f"{broken} of {len(found)}", f"{median(found):.3f}", f"{max(found):.2f}"
        print(case.name, *row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
