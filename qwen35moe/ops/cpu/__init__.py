"""The CPU forms of the operations: fewer passes over memory, blocks that stay in cache."""
