"""Mavors: chunks of frames through an inflated image tower, aggregated over time (arXiv 2504.10068)."""
