"""Image processors as differentiable functions: pixels in [0, 1] to what a model takes."""

from targets.preprocessing.clip import Preprocessor
from targets.preprocessing.layout import Layout, Preprocessing
from targets.preprocessing.resampling import resampling_matrix, resize

__all__ = ["Layout", "Preprocessing", "Preprocessor", "resampling_matrix", "resize"]
