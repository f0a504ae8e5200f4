"""Rated rows: how well each signal of a selector agrees with them, and weights fitted to them.

    python jobs/fit_weights.py --rated rated.jsonl --model BASE
    python jobs/fit_weights.py --rated rated.jsonl --scored outputs/stage_2_selection/DATE/TIME
    python jobs/fit_weights.py --rated rated.jsonl --evaluate-only

Rated rows are rows of a corpus with a label, a number, and where they come in pairs a pair_id. Runs
in one process, without Ray.
"""

import os
import sys

if __name__ == "__main__":
    # Python puts jobs/ first on the path of a script, where select.py would hide the standard
    # library's module `select`; the root of the repository belongs there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    from selectmoe.cli.command_line import run_command
    from selectmoe.cli.fit_weights_command import main

    run_command(main)
