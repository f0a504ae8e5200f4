"""Stage 4: evaluate a model, with or without an adapter, on lm-eval tasks; compare runs.

    python jobs/evaluate.py --model meta-llama/Llama-2-7b-hf --adapter outputs/stage_3_finetune/…/…
    python jobs/evaluate.py --adapter DIR --name selected --tasks mmlu arc_challenge my_task \
        --tasks-dir my_tasks
    ray job submit --working-dir . -- python jobs/evaluate.py --adapter /runs/adapter
    python jobs/evaluate.py --compare RUN RUN RUN

Without --model and --tasks, the selector in the package (gates forced open) is evaluated on the
loss of held-out demo answers and on 120 multiple-choice questions.
"""

import os
import sys

if __name__ == "__main__":
    # Python puts jobs/ first on the path of a script, where select.py would hide the standard
    # library's module `select`; the root of the repository belongs there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    from jobs.stage_4_eval.command import main
    from selectmoe.cli.command_line import run_command

    run_command(main)
