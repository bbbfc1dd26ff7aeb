"""The study in closed-form worlds: every method on Gaussian mixtures, against an exact teacher."""
