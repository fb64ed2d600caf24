"""Measurements of speed and memory; nothing here is needed for training."""
