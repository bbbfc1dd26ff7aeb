"""The parts of `pretrain`: settings, networks, the two training stages, data and quality."""
