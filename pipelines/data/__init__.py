"""The data plane: folders of shards, read in a seeded order with nothing lost."""
