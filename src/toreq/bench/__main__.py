"""``python -m toreq.bench`` is ``toreq bench``."""

import runpy
import sys

# An entry point, not a part: the benches themselves import nothing of the command line.
sys.argv = ["toreq", "bench", *sys.argv[1:]]
runpy.run_module("toreq.cli", run_name="__main__")
