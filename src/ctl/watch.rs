//! `status --watch`: the daemons at a glance, again and again.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use super::cli::{self, Daemon};
use super::exit::Failure;
use super::interrupts::Interrupts;
use super::look::{Statuses, statuses, statuses_text};
use super::print::Output;

/// More often than this the daemons are not asked.
const LEAST: Duration = Duration::from_millis(100);

/// Reads how often to look.
pub(super) fn every(text: &str) -> Result<Duration, String> {
    let every = cli::duration(text)?;
    if every < LEAST { Err(format!("at least {LEAST:?} are wanted")) } else { Ok(every) }
}

/// Shows the daemons until it is interrupted, or nobody reads any more. Who answers at first and then does not
/// is waited for.
pub(super) async fn run(daemon: &Daemon, output: Output, every: Duration) -> Result<(), Failure> {
    let mut interrupts = Interrupts::catch()?;
    let on_terminal = !output.json && io::stdout().is_terminal();
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut has_answered = false;
    loop {
        let look = async {
            tick.tick().await;
            statuses(daemon).await
        };
        let (statuses, failure) = match interrupts.during(look).await {
            Err(_) => return Ok(()),
            Ok(Ok(answers)) => answers,
            Ok(Err(failure)) if has_answered => (Vec::new(), Some(failure)),
            Ok(Err(failure)) => return Err(failure),
        };
        has_answered = true;
        let shown = if output.json {
            one_line(&statuses)?
        } else {
            picture(&statuses, failure.as_ref(), on_terminal)
        };
        if let (Some(failure), false) = (&failure, on_terminal) {
            failure.report();
        }
        if !output.write(shown)? {
            return Ok(());
        }
    }
}

fn one_line(statuses: &Statuses) -> Result<String, Failure> {
    serde_json::to_string(statuses)
        .map_err(|error| Failure::failed(format!("the result is not JSON: {error}")))
}

/// What is drawn: on a terminal over what was there, without wiping it first, which would flicker.
fn picture(statuses: &Statuses, failure: Option<&Failure>, on_terminal: bool) -> String {
    let mut text = statuses_text(statuses);
    if !on_terminal {
        text.push('\n');
        return text;
    }
    if let Some(failure) = failure {
        // Writing to a string does not fail.
        let _ = write!(text, "\n{failure}\n");
    }
    let lines = text.lines().map(|line| format!("{line}\x1b[K\n"));
    format!("\x1b[H{}\x1b[J", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_a_terminal_each_line_replaces_one() {
        let failure = Failure::failed("it is not there");
        let drawn = picture(&Vec::new(), Some(&failure), true);
        assert_eq!(drawn, "\x1b[H\x1b[K\nit is not there\x1b[K\n\x1b[J");
        assert_eq!(picture(&Vec::new(), Some(&failure), false), "\n");
    }

    #[test]
    fn an_interval_has_a_least() {
        assert_eq!(every("2"), Ok(Duration::from_secs(2)));
        assert_eq!(every("100ms"), Ok(Duration::from_millis(100)));
        assert!(every("0").is_err() && every("99ms").is_err() && every("x").is_err());
    }
}
