"""Decoding methods: how a model's answer tokens are chosen, beside greedy decoding."""

from targets.decoding.attention import AttentionCall, AttentionRule, Columns
from targets.decoding.base import Decoding, Step, View

__all__ = ["AttentionCall", "AttentionRule", "Columns", "Decoding", "Step", "View"]
