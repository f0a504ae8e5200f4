"""Stage 0: convert an OLMoE model to a Select-MoE model, and verify that it computes the same.

    python jobs/convert.py --base allenai/OLMoE-1B-7B-0125 --save-path select-moe-1b-7b --verify
    ray job submit --working-dir . -- python jobs/convert.py --base /models/olmoe --save-path /out/m
    python jobs/convert.py --base /models/olmoe --save-path /out/m --verify-only

Runs in one process on the CPU and needs about twice the size of the checkpoint in memory. --verify
loads one model at a time, also in float32 (4 bytes per parameter).
"""

import os
import sys

if __name__ == "__main__":
    # Python puts jobs/ first on the path of a script, where select.py would hide the standard
    # library's module `select`; the root of the repository belongs there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    from functools import partial

    from selectmoe.cli.command_line import run_command
    from selectmoe.cli.convert_command import main

    run_command(partial(main, prog="jobs/convert.py"))
