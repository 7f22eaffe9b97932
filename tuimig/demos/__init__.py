"""The demo's workloads: one module each, a real process that can tell at any time whether its memory is whole.

`tuimig/demo.py` lists and drives them. Their processes import this package, so it stays empty.
"""
