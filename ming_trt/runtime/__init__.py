"""Runs what was built: engines, the KV cache, the sampler, the scheduler and the stages of a request. NumPy only."""
