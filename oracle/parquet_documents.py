"""Tables of documents for the tests of kvfold-retrofit, written by pyarrow.

Usage: python oracle/parquet_documents.py crates/kvfold-retrofit/tests/tables
"""

import pathlib
import sys

import pyarrow
import pyarrow.parquet

rows = range(1, 1201)
table = pyarrow.table(
    {
        "id": pyarrow.array(rows, pyarrow.int64()),
        "title": pyarrow.array([f"Title {row}" for row in rows]),
        "text": pyarrow.array([None if row % 7 == 0 else f"Tale {row}: é." for row in rows]),
        "tags": pyarrow.array([["a", "b"]] * len(rows)),
    },
    schema=pyarrow.schema(
        [
            pyarrow.field("id", pyarrow.int64()),
            pyarrow.field("title", pyarrow.string(), nullable=False),
            pyarrow.field("text", pyarrow.string()),
            pyarrow.field("tags", pyarrow.list_(pyarrow.string())),
        ]
    ),
)
out = pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)
for codec in ["snappy", "zstd", "gzip", "none"]:
    pyarrow.parquet.write_table(table, out / f"{codec}.parquet", compression=codec, row_group_size=500)
