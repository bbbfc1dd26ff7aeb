"""Names of the roles, as recipes, metrics and calls use them."""

GENERATOR, TEACHER, FAKE_SCORE = "generator", "teacher", "fake_score"


ROLES = (GENERATOR, TEACHER, FAKE_SCORE)
