"""Slots whose weights are the nonzeros of one block-diagonal sparse matrix per layer."""
