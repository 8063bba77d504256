//! A man page of a command, with the sections that man-pages(7) has.
//!
//! What clap calls the help's end is taken apart for that: a paragraph that begins with "Example" is one of the
//! examples, one that begins with "Exit status" or speaks of it first is of the exit status, and the rest describes.

use std::io::{self, Write};

use clap::builder::ValueRange;
use clap::{Arg, ArgAction, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use super::exit;

/// The command of which the others are a part.
const CTL: &str = "criu-imagectl";

/// A page.
pub(super) struct Page<'a> {
    command: &'a Command,
    name: String,
    section: &'static str,
}

/// What a command says of itself, by sections.
#[derive(Debug, Default, PartialEq, Eq)]
struct Text {
    description: Vec<String>,
    exit_status: Vec<String>,
    examples: Vec<String>,
}

impl Page<'_> {
    /// That of a command, which is built.
    pub(super) fn of(command: &Command) -> Page<'_> {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
        // The daemons are in section 8, as their units say.
        let section = if name.starts_with(CTL) { "1" } else { "8" };
        Page { command, name, section }
    }

    /// What its file is called.
    pub(super) fn file(&self) -> String {
        format!("{}.{}", self.name, self.section)
    }

    /// Writes it.
    pub(super) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let man = Man::new(self.command.clone()).section(self.section);
        let text = self.text();
        man.render_title(out)?;
        man.render_name_section(out)?;
        section("SYNOPSIS", |roff| _ = roff.text(self.synopsis())).to_writer(out)?;
        section("DESCRIPTION", |roff| paragraphs(roff, &text.description)).to_writer(out)?;
        man.render_options_section(out)?;
        if self.command.has_subcommands() {
            man.render_subcommands_section(out)?;
        }
        section("EXIT STATUS", |roff| paragraphs(roff, &text.exit_status)).to_writer(out)?;
        if !text.examples.is_empty() {
            section("EXAMPLES", |roff| paragraphs(roff, &text.examples)).to_writer(out)?;
        }
        section("SEE ALSO", |roff| _ = roff.text([roman(self.see_also())])).to_writer(out)
    }

    fn text(&self) -> Text {
        let about = self.command.get_long_about().or_else(|| self.command.get_about());
        let after = self.command.get_after_long_help().or_else(|| self.command.get_after_help());
        let all = [about, after].into_iter().flatten().map(ToString::to_string);
        let mut text = Text::of(&all.collect::<Vec<_>>().join("\n\n"));
        if self.name.starts_with(CTL) && self.name != CTL {
            // It is told once, with the command that has the others.
            let table = Text::of(exit::HELP);
            text.exit_status.splice(0..0, table.exit_status);
        }
        text
    }

    /// How it is called, each option with its value.
    fn synopsis(&self) -> Vec<Inline> {
        let name = self.command.get_bin_name().unwrap_or_else(|| self.command.get_name());
        let mut line = vec![bold(name)];
        let shown = || self.command.get_arguments().filter(|argument| !argument.is_hide_set());
        for option in shown().filter(|argument| !argument.is_positional()) {
            line.push(roman(" "));
            optional(&mut line, option.is_required_set(), option_with_value(option));
        }
        for positional in shown().filter(|argument| argument.is_positional()) {
            line.push(roman(" "));
            let mut words = vec![italic(value_name(positional))];
            if positional.get_num_args().is_some_and(|range| range.max_values() > 1) {
                words.push(roman("..."));
            }
            if positional.is_last_set() {
                words.insert(0, bold("-- "));
            }
            optional(&mut line, positional.is_required_set(), words);
        }
        if self.command.has_subcommands() {
            line.extend([roman(" "), italic("COMMAND"), roman(" ...")]);
        }
        line
    }

    fn see_also(&self) -> String {
        let pages =
            [(CTL, "1"), ("criu-image-proxy", "8"), ("criu-image-cache", "8"), ("criu", "8")];
        let others = pages.into_iter().filter(|(name, _)| *name != self.name);
        others.map(|(name, section)| format!("{name}({section})")).collect::<Vec<_>>().join(", ")
    }
}

impl Text {
    fn of(all: &str) -> Text {
        let mut text = Text::default();
        // What is indented after an empty line belongs to the paragraph before.
        let mut last = &mut text.description;
        for paragraph in all.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
            if paragraph.starts_with("Example") {
                last = &mut text.examples;
            } else if let Some(table) = paragraph.strip_prefix("Exit status:\n") {
                text.exit_status.push(table.to_owned());
                last = &mut text.description;
                continue;
            } else if paragraph.starts_with("The exit status") {
                last = &mut text.exit_status;
            } else if !paragraph.starts_with(' ') {
                last = &mut text.description;
            }
            last.push(paragraph.to_owned());
        }
        text
    }
}

/// A section with its head.
fn section(head: &str, fill: impl FnOnce(&mut Roff)) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", [head]);
    fill(&mut roff);
    roff
}

/// Paragraphs, of which what is indented is set as it is.
fn paragraphs(roff: &mut Roff, paragraphs: &[String]) {
    for paragraph in paragraphs {
        roff.control("PP", []);
        let mut as_it_is = false;
        for line in paragraph.lines() {
            let indented = line.strip_prefix("  ");
            if indented.is_some() != as_it_is {
                as_it_is = indented.is_some();
                for control in if as_it_is { ["RS", "nf"] } else { ["fi", "RE"] } {
                    roff.control(control, []);
                }
            }
            roff.text([roman(indented.unwrap_or(line))]);
        }
        if as_it_is {
            roff.control("fi", []);
            roff.control("RE", []);
        }
    }
}

/// Puts what need not be given in brackets.
fn optional(line: &mut Vec<Inline>, is_required: bool, words: Vec<Inline>) {
    if is_required {
        line.extend(words);
    } else {
        line.push(roman("["));
        line.extend(words);
        line.push(roman("]"));
    }
}

fn option_with_value(option: &Arg) -> Vec<Inline> {
    let mut words = Vec::new();
    if let Some(short) = option.get_short() {
        words.push(bold(format!("-{short}")));
    }
    if let Some(long) = option.get_long() {
        if !words.is_empty() {
            words.push(roman("|"));
        }
        words.push(bold(format!("--{long}")));
    }
    match option.get_num_args().filter(ValueRange::takes_values) {
        Some(range) if range.min_values() == 0 => {
            let before = if option.is_require_equals_set() { "[=" } else { " [" };
            words.extend([roman(before), italic(value_name(option)), roman("]")]);
        }
        Some(_) => words.extend([roman(" "), italic(value_name(option))]),
        None if matches!(option.get_action(), ArgAction::Count) => words.push(roman("...")),
        None => {}
    }
    words
}

fn value_name(argument: &Arg) -> String {
    match argument.get_value_names() {
        Some(names) => names.join(" "),
        None => argument.get_id().as_str().to_uppercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::cli::Cli;
    use clap::CommandFactory;

    /// The page of one of the commands, as it is written.
    fn page_of(name: &str) -> String {
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        let sub = command.find_subcommand(name).unwrap();
        let mut out = Vec::new();
        Page::of(sub).write(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn heads(page: &str) -> Vec<&str> {
        page.lines().filter_map(|line| line.strip_prefix(".SH ")).collect()
    }

    /// What is below a head.
    fn below<'a>(page: &'a str, head: &str) -> &'a str {
        let begin = page.find(&format!(".SH {head}\n")).unwrap() + head.len() + 5;
        page[begin..].split(".SH ").next().unwrap()
    }

    #[test]
    fn every_command_has_the_sections_of_a_man_page_in_their_order() {
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let page = page_of(sub.get_name());
            let wanted =
                ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "\"EXIT STATUS\"", "EXAMPLES"];
            assert_eq!(
                heads(&page),
                [&wanted[..], &["\"SEE ALSO\""]].concat(),
                "{}",
                sub.get_name()
            );
            let status = below(&page, "\"EXIT STATUS\"");
            assert!(status.contains("no such snapshot or image"), "{status}");
            assert!(!below(&page, "DESCRIPTION").contains("Example"), "{page}");
        }
    }

    #[test]
    fn the_synopsis_has_the_value_of_every_option() {
        let page = page_of("migrate").replace("\\fB", "").replace("\\fI", "").replace("\\fR", "");
        let synopsis = below(&page, "SYNOPSIS").replace("\\-", "-");
        for part in [
            "criu-imagectl migrate ",
            " -t|--tree PID ",
            "[--max-downtime DURATION]",
            "[--max-rounds N]",
            "[--force]",
            "[--to HOST[:PORT]]",
            "[-- CRIU-OPTION...]",
        ] {
            assert!(synopsis.contains(part), "{part} is not in {synopsis}");
        }
        let page = page_of("open").replace("\\fB", "").replace("\\fI", "").replace("\\fR", "");
        let synopsis = below(&page, "SYNOPSIS").replace("\\-", "-");
        assert!(
            synopsis.contains("[--pages[=ADDRESS:PORT]]") && synopsis.contains(" DIR"),
            "{synopsis}"
        );
    }

    #[test]
    fn what_a_command_says_is_taken_apart() {
        let text = Text::of(
            "It does.\n\nExamples:\n  one\n\n  two\n\nMore of it.\n\nExit status:\n  0  done\n\n\
             The exit status is 5 if it is so.",
        );
        let strings = |all: &[&str]| all.iter().map(|&one| one.to_owned()).collect::<Vec<_>>();
        assert_eq!(text.description, strings(&["It does.", "More of it."]));
        assert_eq!(text.examples, strings(&["Examples:\n  one", "  two"]));
        assert_eq!(text.exit_status, strings(&["  0  done", "The exit status is 5 if it is so."]));
    }
}
