//! A stand-in for CRIU's old `--remote` clients, with their order of calls: a new connection for each
//! image, headers of three fields, no acknowledgements, and an ending that names no snapshot.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use criu_image_relay::criu::remote::{Reply, encode_id};

use crate::client::{Connection, decode_ids};
use crate::criu::RECORDS;
use crate::daemons::Settings;
use crate::hosts::Hosts;

/// `O_RDONLY`, `O_WRONLY` and `O_APPEND`, as they went over the wire.
pub(crate) const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const APPEND: u32 = 0o2000;

/// Which of the old clients.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The patches of 2015 to 2017: bytes on the socket, endings by magic names in `null`.
    Patches,
    /// The last form, of 2020: bytes through a pipe, endings without a name.
    Last,
}

/// Both daemons, set up for it.
pub(crate) fn hosts(form: Form) -> Hosts {
    const PATCHES: Settings<'_> = &[("remote.historical-endings", "true")];
    const LAST: Settings<'_> =
        &[("remote.historical-endings", "true"), ("remote.reads", "\"pipe\"")];
    let settings = if form == Form::Patches { PATCHES } else { LAST };
    Hosts::with(settings, settings)
}

/// A header as they sent it.
pub(crate) fn header(name: &str, id: &str, mode: u32) -> Vec<u8> {
    let mut message = Vec::new();
    for (key, text) in [(0x0a, name), (0x12, id)] {
        message.extend([key, u8::try_from(text.len()).unwrap()]);
        message.extend(text.as_bytes());
    }
    message.push(0x18);
    match mode {
        APPEND => message.extend([0x80, 0x08]),
        small => message.push(u8::try_from(small).unwrap()),
    }
    let length = u32::try_from(message.len()).unwrap();
    [&length.to_le_bytes()[..], &message].concat()
}

/// Where an image is written to, until it is dropped.
pub(crate) enum Writer {
    Socket(Connection),
    Pipe(File),
}

impl Writer {
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        match self {
            Writer::Socket(connection) => connection.say(bytes),
            Writer::Pipe(pipe) => pipe.write_all(bytes).unwrap(),
        }
    }
}

/// CRIU with `--remote`.
pub(crate) struct OldClient<'a> {
    pub(crate) form: Form,
    pub(crate) hosts: &'a Hosts,
}

impl OldClient<'_> {
    /// What they call a snapshot that is none, and with it the only list.
    pub(crate) fn null(&self) -> &'static str {
        if self.form == Form::Patches { "null" } else { "" }
    }

    fn at_proxy(&self, name: &str, id: &str, mode: u32) -> Connection {
        let mut connection = Connection::to_proxy(&self.hosts.proxy);
        connection.say(&header(name, id, mode));
        connection
    }

    fn at_cache(&self, name: &str, id: &str, mode: u32) -> Connection {
        let mut connection = Connection::to_cache(&self.hosts.cache);
        connection.say(&header(name, id, mode));
        connection
    }

    /// `push_snapshot_id`.
    pub(crate) fn append_own_id(&self, id: &str) {
        self.at_proxy("parent", self.null(), APPEND).say(&encode_id(id));
    }

    /// `pull_snapshot_ids` of a dump.
    pub(crate) fn ids_at_proxy(&self) -> Vec<String> {
        list(self.at_proxy("parent", self.null(), READ))
    }

    /// `pull_snapshot_ids` of a restore.
    pub(crate) fn ids_at_cache(&self) -> Vec<String> {
        list(self.at_cache("parent", self.null(), READ))
    }

    /// `write_remote_image_connection`.
    pub(crate) fn create(&self, id: &str, name: &str) -> Writer {
        let connection = self.at_proxy(name, id, WRITE);
        match self.form {
            Form::Patches => Writer::Socket(connection),
            // The connection is closed at once.
            Form::Last => Writer::Pipe(connection.pass_source()),
        }
    }

    pub(crate) fn read_at_proxy(&self, id: &str, name: &str) -> Result<Vec<u8>, Reply> {
        self.read(self.at_proxy(name, id, READ))
    }

    pub(crate) fn read_at_cache(&self, id: &str, name: &str) -> Result<Vec<u8>, Reply> {
        self.read(self.at_cache(name, id, READ))
    }

    /// `read_remote_image_connection`. They know nothing of the size.
    fn read(&self, mut connection: Connection) -> Result<Vec<u8>, Reply> {
        let reply = connection.reply();
        if reply.error != 0 {
            return Err(reply);
        }
        if self.form == Form::Patches {
            return Ok(connection.rest());
        }
        let mut pipe = connection.pass_sink();
        drop(connection);
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        Ok(bytes)
    }

    /// `finish_remote_dump`: nothing is waited for.
    pub(crate) fn end_dump(&self) {
        let name = if self.form == Form::Patches { "DUMP_FINISH" } else { "" };
        drop(self.at_proxy(name, self.null(), WRITE));
    }

    /// `finish_remote_restore`.
    pub(crate) fn end_restore(&self) -> Reply {
        let name = if self.form == Form::Patches { "RESTORE_FINISH" } else { "" };
        self.at_cache(name, self.null(), READ).reply()
    }

    /// A dump or a pre-dump up to its last image, which only a dump has that succeeded. `parent` is
    /// the id that has to stand before one's own.
    #[track_caller]
    pub(crate) fn dump(&self, id: &str, parent: Option<&str>, images: &[(&str, Vec<u8>)]) {
        self.append_own_id(id);
        let ids = self.ids_at_proxy();
        let own = ids.iter().position(|known| known == id).expect("one's own id is in the list");
        assert_eq!(own.checked_sub(1).map(|before| ids[before].as_str()), parent);
        // All are open at once, as CRIU has them.
        let mut open: Vec<_> = images.iter().map(|(name, _)| self.create(id, name)).collect();
        for (writer, (_, bytes)) in open.iter_mut().zip(images) {
            writer.say(bytes);
        }
        drop(open);
        if let Some(parent) = parent {
            assert_eq!(self.read_at_proxy(parent, "pagemap-7.img").unwrap(), RECORDS);
            let none = self.read_at_proxy(parent, "pagemap-8.img").unwrap_err();
            assert_eq!(none.error, 2);
        }
    }
}

/// Another client, a process of its own that ends: each request on a connection of its own. Gives what was
/// answered where an answer was waited for.
pub(crate) fn another_process(socket: &Path, requests: &[(Vec<u8>, bool)]) -> Vec<Reply> {
    const SCRIPT: &str = "
import socket, sys
for k in range(2, len(sys.argv), 2):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(sys.argv[1])
    connection.sendall(bytes.fromhex(sys.argv[k]))
    if sys.argv[k + 1] == 'true':
        reply = b''
        while len(reply) < 4 or len(reply) < 4 + int.from_bytes(reply[:4], 'little'):
            part = connection.recv(1)
            assert part, 'no reply'
            reply += part
        print(reply[4:].hex())
    connection.close()
";
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT]).arg(socket);
    for (bytes, answered) in requests {
        let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        python.args([hex.concat(), answered.to_string()]);
    }
    let output = python.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|k| u8::from_str_radix(&hex[k..k + 2], 16).unwrap()).collect()
    };
    let replies = String::from_utf8(output.stdout).unwrap();
    replies.lines().map(|line| Reply::decode(&bytes(line)).unwrap()).collect()
}

fn list(mut connection: Connection) -> Vec<String> {
    assert_eq!(connection.reply().error, 0);
    decode_ids(&connection.rest())
}
