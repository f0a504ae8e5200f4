"""Files that say of every row in `scored/` whether a selection has kept it, and why not."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selectmoe.data.writers import write_parquet
from selectmoe.selection.blocks import score_blocks
from selectmoe.selection.keep_rule import KeepRule, fate_names
from selectmoe.selection.passes import ShardGroup

NO_SCORE = "rejected"


def write_fates(rule: KeepRule, target: Path, shards: ShardGroup) -> None:
    """A pass: for each scored shard a file of the same name in `target`, with one column `fate` and
    the same rows in the same order."""
    names = [*fate_names().values(), NO_SCORE]
    for shard in shards:
        with pq.ParquetFile(shard) as file:
            fates = np.full(file.metadata.num_rows, len(names) - 1, np.int8)
        for block in score_blocks(shard, rule.columns):
            fates[block.row_numbers] = rule.fates(block)
        column = pa.DictionaryArray.from_arrays(pa.array(fates), pa.array(names))
        write_parquet(target / shard.name, pa.table({"fate": column}))
