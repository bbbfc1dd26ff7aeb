"""The roles, one plain class each, and adapters to the networks. torch.distributed, no Ray."""
