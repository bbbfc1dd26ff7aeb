"""The schedule of an iteration: program, order of calls, execution and simulation."""
