"""The model's components as torch modules: one definition each, from which every back end derives.

A module is built from the configuration alone, on any device (`meta` needs no memory). Its `weight_map` says which
checkpoint tensors make each parameter (`weights.py`); operators that back ends replace are in `ops.py`.
"""
