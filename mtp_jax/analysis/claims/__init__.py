"""Claims about multi-token prediction, each with the rule that decides it.

One file an experiment: its claims, how each is tested, its picture. A claim belongs to
an experiment in a preset (`experiments/NAME.py:PRESET`), whose results are kept in the
folder `NAME_PRESET`. A rule is written before the results of its experiment are read,
unless it says otherwise; what is expected is in the experiment's file, from before the
run. Nothing measured stands here. Published figures are those that could be checked in
the paper itself; where there is none, that is said.
"""
