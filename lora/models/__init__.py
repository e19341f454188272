"""Torch models: adapted layers, adapting a model, an encoder, a manager and a registry."""
