"""Execution: where and in what order tensors are worked on. Every executor writes the same bytes."""
