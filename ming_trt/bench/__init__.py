"""Latency benchmark of a running server: load, measurements, accounting by stage, reports. Light: numpy, no torch."""
