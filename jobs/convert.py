"""Stage 0: convert an OLMoE model to a Select-MoE model, and verify that it computes the same.

    python jobs/convert.py --base allenai/OLMoE-1B-7B-0125 --save-path select-moe-1b-7b --verify
    ray job submit --working-dir . -- python jobs/convert.py --base /models/olmoe --save-path /out/m
    python jobs/convert.py --base /models/olmoe --save-path /out/m --verify-only

Runs in one process on the CPU and needs about twice the size of the checkpoint in memory. --verify
loads one model at a time, also in float32 (4 bytes per parameter).
"""

import os
import sys

# Run as a script, Python puts jobs/ first on the path, where select.py hides the standard
# library's module `select`; the repository root belongs there instead.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.getcwd()) != _HERE]
if os.path.dirname(_HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(_HERE))

if __name__ == "__main__":
    from functools import partial

    from selectmoe.cli.command_line import run_command
    from selectmoe.cli.convert_command import main

    run_command(partial(main, prog="jobs/convert.py"))
