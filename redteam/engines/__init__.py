"""Engines: where the units of a plan are executed."""
