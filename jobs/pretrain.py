"""Stage 1: train the quality gates to tell a sample from a corrupted copy of it (gate warm-up).

    python jobs/pretrain.py preset=demo
    python jobs/pretrain.py --model select-moe-1b-7b dataset.folder=/data \
        dataset.names=cot,dolly,flan_v2,oasst1 --num-workers 4
    python jobs/pretrain.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data corpus.jsonl
    ray job submit --working-dir . -- python jobs/pretrain.py --data /data/corpus --model /models/m

Without --data and --model, the demo corpus and the tiny selector in the package are used. The
output folder contains full_rank_weights.safetensors, for model_checkpoint_path of jobs/select.py.
On a base, any other causal language model, gates are fitted to features that are computed once; the
output folder is then a selector folder, for --model or model_checkpoint_path.
"""

import os
import sys

if __name__ == "__main__":
    # Python puts jobs/ first on the path of a script, where select.py would hide the standard
    # library's module `select`; the root of the repository belongs there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    from jobs.stage_1_pretrain.command import main
    from selectmoe.cli.command_line import run_command

    run_command(main)
