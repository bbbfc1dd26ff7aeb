"""Names of the roles, as recipes, metrics and calls use them."""

GENERATOR, TEACHER, FAKE_SCORE = "generator", "teacher", "fake_score"


ROLES = (GENERATOR, TEACHER, FAKE_SCORE)
"""Roles of every method."""

DISCRIMINATOR = "discriminator"
"""Role of methods with an adversarial term, beside these."""
