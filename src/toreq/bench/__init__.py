"""Benchmarks, outside the tests' pass or fail: ``make bench``."""
