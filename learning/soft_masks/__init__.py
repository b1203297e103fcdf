"""Masks while they are learned: noise, soft samples, budgets, where learning begins."""
