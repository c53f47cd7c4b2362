//! Tables for people.

use crate::output;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};

/// How a column is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// Words.
    Text(&'static str),
    /// Numbers.
    Number(&'static str),
}

/// Writes a table to standard output. Without rows there is nothing to head: then `nothing` is said on standard error.
pub(crate) fn print<const N: usize>(
    columns: [Column; N],
    rows: Vec<[String; N]>,
    nothing: &str,
) -> std::io::Result<()> {
    if rows.is_empty() {
        output::note(nothing);
        return Ok(());
    }
    output::line(&render(columns, rows))
}

/// Sets a table without frames, so that its columns can be cut and pasted.
pub(crate) fn render<const N: usize>(columns: [Column; N], rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(columns.map(|column| match column {
        Column::Text(name) | Column::Number(name) => name.to_uppercase(),
    }));
    table.add_rows(rows);
    for (set, column) in columns.iter().zip(table.column_iter_mut()) {
        column.set_padding((0, 2));
        if matches!(set, Column::Number(_)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_left_and_numbers_right() {
        let rows = vec![["a".to_owned(), "1".to_owned()], ["bcd".to_owned(), "123456".to_owned()]];
        let text = render([Column::Text("x"), Column::Number("count")], rows);
        assert_eq!(text, "X     COUNT\na         1\nbcd  123456");
    }
}
