//! A timeline as a picture.

use std::fmt::Write as _;

use super::{Name, Part, Told, extent, took};
use crate::criu::names::is_unprintable;
use crate::ctl::look::role_word;
use crate::ctl::print::size;

/// Pixels: the whole width, where the bars begin and end, and the height of a row.
const WIDTH: u64 = 960;
const LEFT: u64 = 190;
const RIGHT: u64 = 780;
const ROW: u64 = 26;
/// Above the first row.
const TOP: u64 = 64;

/// Colours that are told apart on light and on dark ground, and by those who do not see all colours.
const STYLE: &str = "\
text{font:13px sans-serif;fill:#222}.title{font-size:16px;font-weight:bold}.quiet{fill:#666}\
.ground{fill:#fff}.grid{stroke:#ddd}.failed{stroke:#c00;stroke-width:2;stroke-dasharray:4}\
.round{fill:#56b4e9}.dump{fill:#d55e00}.acknowledgement{fill:#e69f00}.arrival{fill:#cc79a7}\
.wait{fill:#bbb}.restore{fill:#009e73}\
@media(prefers-color-scheme:dark){text{fill:#eee}.quiet{fill:#aaa}.ground{fill:#1b1b1b}.grid{stroke:#444}}";

/// The picture, as SVG.
pub(super) fn svg(told: &Told) -> String {
    let extent = extent(&told.phases);
    let height = TOP + ROW * told.phases.len() as u64 + 40;
    let (id, all) = (escape(&told.snapshot), took(extent.1 - extent.0));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\">\n<title>Timeline of snapshot {id}</title>\n\
         <style>{STYLE}</style>\n<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\n\
         <text class=\"title\" x=\"16\" y=\"28\">{id}: {all}</text>\n"
    );
    grid(&mut svg, extent.1 - extent.0, height - 40);
    for (part, y) in told.phases.iter().zip((0..).map(|row| TOP + row * ROW)) {
        bar(&mut svg, part, extent, y);
    }
    svg + "</svg>\n"
}

/// Lines at round times, and the times.
fn grid(svg: &mut String, all_ms: u64, bottom: u64) {
    let step = step(all_ms);
    for ms in (0..=all_ms).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
        let (x, top) = (x(ms, all_ms), TOP - 6);
        let text = bottom + 20;
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{x}\" x2=\"{x}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text class=\"quiet\" x=\"{x}\" y=\"{text}\" text-anchor=\"middle\">{}</text>",
            took(ms)
        );
    }
}

/// How far apart lines are: four to ten of them, at 1, 2 or 5 times a power of ten.
fn step(all_ms: u64) -> u64 {
    let mut power = 1;
    loop {
        for times in [1, 2, 5] {
            if all_ms / (times * power) <= 8 {
                return times * power;
            }
        }
        power *= 10;
    }
}

fn x(ms: u64, all_ms: u64) -> u64 {
    LEFT + (RIGHT - LEFT) * ms / all_ms.max(1)
}

fn bar(svg: &mut String, part: &Part, (begun, ended): (u64, u64), y: u64) {
    let all = ended - begun;
    let from = x(part.begun_ms - begun, all);
    let end = if part.ended_ms == 0 { ended } else { part.ended_ms };
    let to = x(end.saturating_sub(begun), all).max(from + 2);
    let mut note = match part.ended_ms {
        0 => "goes on".to_owned(),
        ended => took(ended.saturating_sub(part.begun_ms)),
    };
    if part.bytes > 0 {
        let _ = write!(note, ", {}", size(part.bytes));
    }
    if part.failed {
        note += ", failed";
    }
    let (where_, phase) = (role_word(part.daemon), part.phase.word());
    let still = if part.phase == Name::Dump { " (stands still)" } else { "" };
    let failed = if part.failed { " failed" } else { "" };
    let (width, height, base, after) = (to - from, ROW - 8, y + 14, to + 8);
    let _ = writeln!(
        svg,
        "<text x=\"16\" y=\"{base}\">{where_} <tspan class=\"quiet\">{phase}{still}</tspan></text>\
         <rect class=\"{phase}{failed}\" x=\"{from}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"2\"/>\
         <text x=\"{after}\" y=\"{base}\">{note}</text>"
    );
}

fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            c if is_unprintable(c) => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::tests::told;
    use super::*;

    #[test]
    fn each_phase_is_a_bar_in_its_place() {
        let svg = svg(&told());
        for (class, from, width) in
            [("round", LEFT, 168), ("dump", 442, 85), ("wait", 527, 253), ("restore", RIGHT, 2)]
        {
            let rect = format!("<rect class=\"{class}\" x=\"{from}\" ");
            let at = svg.find(&rect).unwrap_or_else(|| panic!("no {rect} in {svg}"));
            assert!(svg[at..].split('/').next().unwrap().contains(&format!("width=\"{width}\"")));
        }
        assert!(svg.contains(">1.49 s</text>"), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 7);
    }

    #[test]
    fn an_id_cannot_break_the_picture() {
        let told = Told { snapshot: "<&\u{1}>".to_owned(), phases: Vec::new() };
        assert!(svg(&told).contains("snapshot &lt;&amp; &gt;<"));
    }

    #[test]
    fn lines_are_at_round_times() {
        for (all, wanted) in [(0, 1), (8, 1), (9, 2), (3500, 500), (90_000, 20_000)] {
            assert_eq!(step(all), wanted, "{all} ms");
        }
    }
}
