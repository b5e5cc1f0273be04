"""Runs that reproduce published systems: presets, wiring, evaluation, figures and tables."""
