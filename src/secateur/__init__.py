"""Secateur: prune trained PyTorch models to a budget."""
