"""Data sets: pictures with questions whose answers are known."""
