"""Stage 3: finetune a model with LoRA on selected rows, or on as many random rows.

    python jobs/finetune.py preset=llama-2-7b --data outputs/stage_2_selection/…/selected_data.jsonl
    python jobs/finetune.py preset=tiny --data outputs/stage_2_selection/… dataset.mode=random
    ray job submit --working-dir . -- python jobs/finetune.py --model /models/m --data /data/run

Without --data and --model, the demo corpus and the tiny selector in the package (with its gates
forced open) are used. The output folder contains checkpoint-N, for --adapter of jobs/evaluate.py.
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
    from jobs.stage_3_finetune.command import main
    from selectmoe.cli.command_line import run_command

    run_command(main)
