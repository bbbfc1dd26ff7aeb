"""Ray core without diffusion: worker groups, schedules, pools. It could run any SPMD program."""
