"""Stages of an iteration: the algorithm as data, and the network passes of each."""
