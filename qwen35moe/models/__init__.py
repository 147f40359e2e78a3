"""The models: the modules put together, and what a call takes and returns."""
