"""Claims about multi-token prediction, each with the rule that decides it.

One file an experiment: its claims, how each is tested, its picture. A claim belongs to
an experiment in a preset (`experiments/NAME.py:PRESET`), whose results are kept in the
folder `NAME_PRESET`. A rule is written before the results of its experiment are read,
unless the rule names the exception; the experiment's own file has what was expected
before the run. Nothing measured stands here. Published figures were checked in the
paper itself; a claim without a figure names the lack.
"""
