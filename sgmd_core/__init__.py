"""The mathematics of score-gradient-matching distillation, in plain torch.

No Ray, no process groups, no files and no global random state live here.
"""
