# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: each prints a table (ours, the reference, the ratio, measured in one run) and writes JSON."""
