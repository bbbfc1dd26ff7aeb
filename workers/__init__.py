"""Who does it: one plain class a role, and adapters to the networks. torch.distributed, no Ray."""
