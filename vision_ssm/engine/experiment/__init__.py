"""Comparisons under one budget: the runs, and the tables and figures rendered from them."""
