//! Parquet: a column of strings.

use super::{Document, wrong};
use crate::error::RetrofitError;
use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use std::path::Path;

/// Rows that are decoded at a time.
const ROWS: usize = 1024;

/// Adds the documents of a table: column `field`, one per row; rows without a text are passed over.
pub(super) fn read<R: ChunkReader + 'static>(
    content: R,
    path: &Path,
    field: &str,
    documents: &mut Vec<Document>,
) -> Result<(), RetrofitError> {
    let damaged = |error: ParquetError| wrong(path, format!("cannot be read as Parquet: {error}"));
    let file = SerializedFileReader::new(content).map_err(damaged)?;
    let schema = file.metadata().file_metadata().schema_descr();
    let column = schema.columns().iter().position(|column| column.path().string() == field);
    let Some(column) = column else {
        let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).take(8).collect();
        let names = names.join(", ");
        return Err(wrong(
            path,
            format!("has no column `{field}`; the columns are {names}: name one with --text-field"),
        ));
    };
    let description = schema.column(column);
    if description.physical_type() != Type::BYTE_ARRAY || description.max_rep_level() > 0 {
        return Err(wrong(path, format!("column `{field}` does not hold one text per row")));
    }

    let mut row = 0;
    for group in 0..file.num_row_groups() {
        let group = file.get_row_group(group).map_err(damaged)?;
        let ColumnReader::ByteArrayColumnReader(mut column) = group.get_column_reader(column).map_err(damaged)? else {
            return Err(wrong(path, format!("column `{field}` does not hold texts in all its row groups")));
        };
        let (mut present, mut values) = (Vec::new(), Vec::new());
        loop {
            present.clear();
            values.clear();
            let (rows, ..) = column.read_records(ROWS, Some(&mut present), None, &mut values).map_err(damaged)?;
            if rows == 0 {
                break;
            }
            // A column in which every row has a value states no levels.
            let required = description.max_def_level() == 0;
            let mut values = values.iter();
            for n in 0..rows {
                row += 1;
                if !required && present.get(n).is_none_or(|&level| level < description.max_def_level()) {
                    continue;
                }
                let Some(value) = values.next() else { continue };
                let source = format!("{}:row {row}", path.display());
                let text = value.as_utf8().map_err(|error| RetrofitError::Text {
                    place: source.clone(),
                    reason: format!("not UTF-8 text in column `{field}`: {error}"),
                })?;
                if !text.trim().is_empty() {
                    documents.push(Document { source, text: text.to_owned() });
                }
            }
        }
    }
    Ok(())
}
