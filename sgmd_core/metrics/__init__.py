"""Measurements of generated clips; pure functions of pixels or features."""
