"""Slots whose tensors are dense: in turn on a CPU, stacked along one axis on a GPU."""
