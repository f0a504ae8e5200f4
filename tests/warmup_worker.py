"""One of several processes of warm-ups with gloo, as Ray would start them; run as a script."""

import json
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def main(rank: int, num_workers: int, port: str, runs: dict[str, dict[str, object]]) -> None:
    """runs: settings by folder; one process does all, since importing torch is half of a run."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip
    import torch

    from selectmoe.config.loading import from_values
    from selectmoe.config.warmup import WarmupConfig
    from selectmoe.errors import SelectMoeError
    from selectmoe.training.worker import TrainingWorker
    from selectmoe.warmup.base_model import is_base
    from selectmoe.warmup.base_stage import run_base_steps
    from selectmoe.warmup.stage import run_warmup

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=num_workers)
    for folder, settings in runs.items():
        worker = TrainingWorker(
            output=Path(folder),
            scratch=Path(folder, f"scratch-{rank}"),
            rank=rank,
            num_workers=num_workers,
        )
        config = from_values(WarmupConfig, settings)
        run = run_base_steps if config.model and is_base(config.model) else run_warmup
        try:
            run(config, worker)
        except SelectMoeError as error:
            sys.stdout.write(f"error: {error}\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
