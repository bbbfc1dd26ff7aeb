"""Worlds whose truth is known: clips whose properties are read exactly from pixels."""
