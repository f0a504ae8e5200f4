"""Stage 3: finetune a model with LoRA on selected rows, or on as many random rows.

    python jobs/finetune.py preset=llama-2-7b --data outputs/stage_2_selection/…/selected_data.jsonl
    python jobs/finetune.py preset=tiny --data outputs/stage_2_selection/… dataset.mode=random
    ray job submit --working-dir . -- python jobs/finetune.py --model /models/m --data /data/run

Without --data and --model, the demo corpus and the tiny selector in the package (with its gates
forced open) are used. The output folder is what --adapter of jobs/evaluate.py takes.
"""

import os
import sys

if __name__ == "__main__":
    # Python puts jobs/ first on the path of a script, where select.py would hide the standard
    # library's module `select`; the root of the repository belongs there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    from jobs.stage_3_finetune.command import main
    from selectmoe.cli.command_line import run_command

    run_command(main)
