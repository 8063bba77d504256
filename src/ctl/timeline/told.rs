//! A timeline as text: a table with bars.

use std::fmt::Write as _;

use super::{Part, Told, extent, took};
use crate::ctl::look::role_word;
use crate::ctl::print::{clean, size, table};

/// How wide the bars are together.
const WIDTH: u64 = 40;

/// The text.
pub(super) fn text(told: &Told) -> String {
    let extent = extent(&told.phases);
    let all = took(extent.1 - extent.0);
    let mut text = format!("{}: {all} from the beginning to the end\n\n", clean(&told.snapshot));
    let rows: Vec<_> = told.phases.iter().map(|part| row(part, extent)).collect();
    text += &table(&["WHERE", "PHASE", "AT", "TOOK", "BYTES", ""], &[2, 3, 4], &rows);
    if told.phases.is_empty() {
        let _ = writeln!(text, "nothing has come of it");
    }
    text
}

fn row(part: &Part, extent: (u64, u64)) -> Vec<String> {
    let failed = if part.failed { " failed" } else { "" };
    let lasted = match part.ended_ms {
        0 => "goes on".to_owned(),
        ended => took(ended.saturating_sub(part.begun_ms)),
    };
    vec![
        role_word(part.daemon).to_owned(),
        format!("{}{failed}", part.phase.word()),
        took(part.begun_ms - extent.0),
        lasted,
        if part.bytes > 0 { size(part.bytes) } else { "-".to_owned() },
        bar(part, extent),
    ]
}

/// Where in the whole a phase is. The shortest has one mark.
fn bar(part: &Part, (begun, ended): (u64, u64)) -> String {
    let column = |ms: u64| {
        let column = (ms - begun) * WIDTH / (ended - begun).max(1);
        usize::try_from(column.min(WIDTH)).unwrap_or(0)
    };
    let from = column(part.begun_ms).min(column(ended).saturating_sub(1));
    let to = column(if part.ended_ms == 0 { ended } else { part.ended_ms }).max(from + 1);
    " ".repeat(from) + &"█".repeat(to - from)
}

#[cfg(test)]
mod tests {
    use super::super::tests::told;
    use super::*;

    #[test]
    fn it_reads_well() {
        let wanted = "\
web: 3.50 s from the beginning to the end

WHERE  PHASE                AT     TOOK  BYTES
proxy  round              0 ms   1.00 s  4 KiB  ███████████
proxy  dump             1.50 s   500 ms  4 KiB                   █████
cache  arrival          1.51 s   495 ms  4 KiB                   █████
proxy  acknowledgement  2.00 s    10 ms  4 KiB                        █
cache  wait             2.00 s   1.49 s      -                        ██████████████████
cache  restore          3.50 s  goes on  4 KiB                                         █
";
        assert_eq!(text(&told()), wanted);
    }

    #[test]
    fn nothing_is_nothing() {
        let told = Told { snapshot: "web".to_owned(), phases: Vec::new() };
        assert!(text(&told).ends_with("nothing has come of it\n"));
    }
}
