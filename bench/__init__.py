"""Measurements. Nothing under medusa_kernels or medusa_engine imports this package."""
