"""Evaluation: clip sets sampled, measured and compared with the teacher."""
