"""Errors of `targets`; a message says what, where, the value, what is allowed, what to do."""


class TargetError(Exception):
    """A target could not be loaded or cannot do what was asked of it."""


class CompressionError(TargetError):
    """A compressor was configured or used in a way that has no meaning."""


class KnowledgeError(TargetError):
    """An attack reached for something its threat model does not grant it."""


class NonFiniteError(TargetError):
    """The model computed NaN or infinity, so what it says means nothing."""
