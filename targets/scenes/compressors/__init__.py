"""Recipes of the trained compressors on a scenes LVLM; the weights are shipped beside the model's.

`train_explainability`, `train_quecc` and `train_tokenflex` make the weights, `evaluate` measures
them on the test split and writes their cards. The model itself stays frozen in all of them.
"""
