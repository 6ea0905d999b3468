import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ursa.data.clips import SELECTION_SCHEMA, table_bytes


@pytest.mark.parametrize("number", [0, 1025, 30_000])
def test_a_table_made_in_parts_has_the_bytes_of_one_made_whole(number):
    rows = [
        {"clip_id": f"{i:032x}", "source_uri": f"file:///{i // 7}", "kept": i % 3 > 0}
        for i in range(number)
    ]
    whole = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=SELECTION_SCHEMA)
    pq.write_table(table, whole, compression="zstd")
    assert table_bytes(SELECTION_SCHEMA, iter(rows)) == whole.getvalue()
