"""Engines start the trials of a sweep; `launch.engines.engine` is their interface.

  local       worker processes on this machine
  slurm       job arrays
  kubernetes  a JobSet for every trial
  print       the commands alone, for any other scheduler

Every task of a Slurm job imports this package: it imports nothing.
"""
