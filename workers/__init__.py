"""Who does it: one plain class a role, and the adapters to the networks. torch.distributed yes, Ray no."""
