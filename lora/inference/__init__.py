"""Running an encoder with cards: the encoder itself, the manager of what is active, the router that
picks.
"""
