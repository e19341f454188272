"""Torch models: adapted layers, the rewrite that adapts a model, an encoder, manager and registry."""
