"""Properties that hold for all inputs, tried on random ones (hypothesis).

`make test` tries a few of each, always the same ones. `make soak` tries new ones for half an hour and tells how many.
"""
