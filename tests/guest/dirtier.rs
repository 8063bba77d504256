//! Processes that change their memory when they are told to, and what they must hold then:
//! `tests/bed/dirtier` in Rust.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use crate::bed::{Guest, build};

/// A tree of processes in a guest. The first is called `a`.
pub(crate) struct Dirtier<'a> {
    guest: &'a Guest,
    dir: String,
    /// As options.
    sizes: String,
    /// What each was told, with what it has from the process that forked it.
    told: BTreeMap<String, Told>,
    /// What was done to the memory that they share.
    shared: Vec<String>,
}

#[derive(Clone, Default)]
struct Told {
    commands: Vec<String>,
    churned: u64,
}

impl<'a> Dirtier<'a> {
    /// Starts the first process, with so much memory of its own and so much shared, in MiB. Its directory
    /// is `dir`, which is made.
    #[track_caller]
    pub(crate) fn start(guest: &'a Guest, dir: &str, private: u32, shared: u32) -> Dirtier<'a> {
        let sizes = format!("--mib {private} --shared-mib {shared}");
        guest.ok(&format!("rm -rf {dir}; mkdir -p {dir}"));
        guest.start(&format!("dirtier run --dir {dir} {sizes}"), &format!("{dir}/log"));
        let told = BTreeMap::from([("a".to_owned(), Told::default())]);
        Dirtier { guest, dir: dir.to_owned(), sizes, told, shared: Vec::new() }
    }

    /// Tells a process to do something, and waits until it is done; returns its answer.
    #[track_caller]
    pub(crate) fn tell(&mut self, name: &str, command: &str) -> Value {
        let answer = self.ask(name, command);
        match command.split_once(' ') {
            Some(("share", _)) => self.shared.push(command.to_owned()),
            Some(("fork", child)) => {
                let told = self.told[name].clone();
                self.told.insert(child.to_owned(), told);
            }
            Some(("churn", "0")) => self.count_churn(name),
            _ => self.told.get_mut(name).unwrap().commands.push(command.to_owned()),
        }
        answer
    }

    /// Churn has stopped: only now is it known what it has done.
    #[track_caller]
    fn count_churn(&mut self, name: &str) {
        let churned = self.ask(name, "report")["churned"].as_u64().unwrap();
        let told = self.told.get_mut(name).unwrap();
        told.commands.push(format!("churned {}", churned - told.churned));
        told.churned = churned;
    }

    #[track_caller]
    fn ask(&self, name: &str, command: &str) -> Value {
        let dir = &self.dir;
        let tell =
            format!("dirtier tell {dir} {name} {command} || {{ cat {dir}/log >&2; exit 1; }}");
        serde_json::from_str(&self.guest.ok(&tell)).unwrap()
    }

    /// A process is there and holds what it must after all that it was told, none of which is under way.
    #[track_caller]
    pub(crate) fn check(&self, name: &str) {
        let report = self.ask(name, "report");
        let expected = Command::new(build().join("examples/dirtier"))
            .arg("expect")
            .args(self.sizes.split(' '))
            .args(&self.told[name].commands)
            .args(&self.shared)
            .output()
            .unwrap();
        assert!(expected.status.success(), "{expected:?}");
        let expected: Value = serde_json::from_slice(&expected.stdout).unwrap();
        for memory in ["private", "shared"] {
            assert_eq!(report[memory], expected[memory], "the {memory} memory of {name}");
        }
    }

    /// The pid of a process, from its last answer.
    #[track_caller]
    pub(crate) fn pid(&self, name: &str) -> u64 {
        let answer = self.guest.ok(&format!("cat {}/{name}.done", self.dir));
        serde_json::from_str::<Value>(&answer).unwrap()["pid"].as_u64().unwrap()
    }

    /// Whether a process is there, here or restored.
    pub(crate) fn lives(&self, name: &str) -> bool {
        self.guest.run(&format!("test -d /proc/{}", self.pid(name))).status == 0
    }
}

impl Drop for Dirtier<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for name in self.told.keys() {
            self.guest.run(&format!("kill -KILL {}", self.pid(name)));
        }
    }
}

/// A tree that is another one in each of three rounds: it forks twice, memory is moved and unmapped, and a process
/// ends.
pub(crate) struct ChangingTree<'a>(Dirtier<'a>);

impl<'a> ChangingTree<'a> {
    /// Starts its first process, in the directory `dir`.
    #[track_caller]
    pub(crate) fn start(guest: &'a Guest, dir: &str) -> ChangingTree<'a> {
        ChangingTree(Dirtier::start(guest, dir, 8, 8))
    }

    /// Does what is to be done before a round, which is 0, 1 or 2.
    #[track_caller]
    pub(crate) fn change(&mut self, round: usize) {
        let changes: &[_] = match round {
            0 => &[("a", "fork b"), ("b", "dirty 1 5"), ("b", "share 1 5")],
            1 => &[
                ("a", "fork c"),
                ("c", "dirty 2 3"),
                ("a", "move 500 100"),
                ("b", "unmap 700 200"),
                ("c", "share 2 11"),
            ],
            2 => &[("b", "exit"), ("a", "dirty 3 50")],
            _ => panic!("there is no round {round}"),
        };
        for (name, command) in changes {
            self.0.tell(name, command);
        }
    }

    /// The pid of its root.
    #[track_caller]
    pub(crate) fn pid(&self) -> u64 {
        self.0.pid("a")
    }

    /// All that is left of it after the rounds is there, holds what it must, and shares what it shared.
    #[track_caller]
    pub(crate) fn check(&mut self) {
        assert!(!self.0.lives("b"));
        self.0.check("a");
        self.0.check("c");
        self.0.tell("c", "share 3 2");
        self.0.check("a");
    }
}
