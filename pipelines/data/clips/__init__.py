"""Clips: decoding videos to the frames, size and rate that training wants."""
