"""Everything that needs a GPU, in calls of less than ten minutes: `make gpu`, or `python -m bench.gpu`.

The phases of `phases.py` run one after the other, what matters most first, each in a process of its own: a crash, a
hang or a broken CUDA context costs one case. Results are rows of JSON; the table of `report.py` is printed last.
"""
