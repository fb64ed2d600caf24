"""The programs that the package installs: dvrl-train, dvrl-evaluate, dvrl-plot and dvrl-reproduce."""

import sys

if sys.flags.optimize > 1:
    print("error: python -OO (or PYTHONOPTIMIZE=2): must be off, since a dependency reads docstrings", file=sys.stderr)
    sys.exit(2)
