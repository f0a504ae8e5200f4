"""Stage 2: score a corpus and keep exactly the best fraction of it, `--pct`.

    python jobs/select.py --pct 0.05 --data corpus.jsonl --model selector/
    ray job submit --working-dir . -- python jobs/select.py --pct 0.05 --data /data/corpus
    python jobs/select.py --scored outputs/stage_2_selection/2026-01-31/12-00-00 --pct 0.1

Without --data and --model, the demo corpus and the tiny selector in the package are used.
"""

import os
import sys

# Run as a script, Python puts jobs/ first on the path, where this file hides the standard
# library's module `select`; the repository root belongs there instead.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.realpath(path or os.getcwd()) != _HERE]
if os.path.dirname(_HERE) not in sys.path:
    sys.path.insert(0, os.path.dirname(_HERE))

if __name__ == "select":  # another script of jobs/ wanted the standard library's module
    del sys.modules["select"]
    import select  # noqa: F401 (the module itself: it replaces this one in sys.modules)
elif __name__ in ("__main__", "jobs.select"):
    from jobs.stage_2_selection.command import main

    if __name__ == "__main__":
        from selectmoe.cli.command_line import run_command

        run_command(main)
