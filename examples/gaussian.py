"""SGMD in one process: a one-step generator learns a Gaussian from an exact teacher."""

import torch

import sgmd

torch.manual_seed(0)
text = sgmd.gaussian_text(mean=torch.full((64,), 0.7), std=torch.full((64,), 0.5))
teacher, generator = sgmd.GaussianVelocity(), sgmd.AffineGenerator(mean=0.0, std=1.0)
fake_score = sgmd.LearnedGaussian(mean=0.0, std=1.0)
objective, grid = sgmd.SgmdObjective(lambda_nr=0.0), sgmd.FlowMatchSchedule().few_step_grid(1)
steps_generator = torch.optim.Adam(generator.parameters(), lr=1e-2, betas=(0.0, 0.999))
steps_fake = torch.optim.Adam(fake_score.parameters(), lr=4e-2, betas=(0.0, 0.999))

for _ in range(240):
    x0 = sgmd.rollout(generator, grid, torch.randn(64, 1, 1, 4, 4), text, 0, keep_graph=True)
    leaf = x0.detach().requires_grad_()
    query = sgmd.NoisedBatch(leaf, 0.02 + 0.96 * torch.rand(64), torch.randn_like(leaf), text)
    velocity_fake = fake_score(query.x_t, query.sigma, text)
    velocity_teacher = teacher(query.x_t, query.sigma, text)
    loss = objective.generator_loss(query, velocity_fake, velocity_teacher).value
    (grad_x0,) = torch.autograd.grad(loss, leaf, retain_graph=True)  # all that travels back
    steps_fake.zero_grad()
    objective.tracking_loss(query, velocity_fake).value.backward(inputs=[*fake_score.parameters()])
    steps_generator.zero_grad()
    x0.backward(grad_x0)
    steps_generator.step()
    steps_fake.step()
print(f"mean {generator.mean.item():.3f} of 0.700, std {generator.std.item():.3f} of 0.500")
