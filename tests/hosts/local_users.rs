//! Users of the cache's own machine at its link, by whichever of its addresses.

use std::io::{BufRead, BufReader};

use crate::bed::{Bed, Host, wait_until};

/// Introduces itself to a cache at an address, and prints what comes back.
const SPEAK: &str = "import socket, struct, sys
link = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET)
link.settimeout(5)
link.connect((sys.argv[1], 9996))
# The preface, and a HELLO.
link.sendall(b'CRIURLAY\\x01\\0\\0\\0' + struct.pack('<HHI', 1, 3, 0) + b'\\x0a\\x01x')
stream = link.makefile('rb')
stream.read(12)
kind, length, _ = struct.unpack('<HHI', stream.read(8))
print(kind, stream.read(length))
";
const WELCOME: &str = "2 ";
const GOODBYE: &str = "3 ";

fn speak(bed: &Bed, uid: &str, address: &str) -> String {
    let user = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"];
    bed.ok(Host::B, &[&user[..], &["python3", "-c", SPEAK, address]].concat())
}

#[test]
fn another_user_of_the_caches_host_has_no_link_by_any_of_its_addresses() {
    let bed = Bed::up();
    bed.ctl(Host::B, &["status"]);
    for insecure in ["false", "true"] {
        bed.configure(Host::B, "insecure", insecure);
        bed.ok(Host::B, &["systemctl", "reload", "criu-image-cache"]);
        for address in ["127.0.0.1", "127.0.0.7", "::1", "10.77.0.2"] {
            let told = speak(&bed, "65534", address);
            let why = "its uid, 65534, is not in allow-uids";
            assert!(told.starts_with(GOODBYE) && told.contains(why), "{address}: {told}");
            let told = speak(&bed, "0", address);
            assert!(told.starts_with(WELCOME), "{address}: {told}");
        }
    }
    assert!(bed.list(Host::B).is_empty());
    wait_until("the refusals are in the journal", || {
        let refused = bed.journal(Host::B, &["-u", "criu-image-cache", "PRIORITY=4"]);
        let why = "is refused: its uid, 65534, is not in allow-uids";
        refused.iter().filter(|e| e["MESSAGE"].as_str().unwrap().contains(why)).count() == 8
    });
    bed.configure(Host::B, "allow-uids", "[65534]");
    bed.ok(Host::B, &["systemctl", "reload", "criu-image-cache"]);
    assert!(speak(&bed, "65534", "127.0.0.1").starts_with(WELCOME));
    let put = ["criu-imagectl", "put", "--list", "--finish", "web", "/etc/hostname"];
    bed.ok(Host::A, &put);
}

/// Answers as a cache would, at a port or a unix socket of a user's, and prints what the proxy says after that.
const POSE: &str = "import os, socket, struct, sys
where = sys.argv[1]
if where.startswith('/'):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(where)
    os.chmod(where, 0o666)
    listener.listen()
else:
    listener = socket.create_server(('127.0.0.1', int(where)))
while True:
    link = listener.accept()[0]
    stream = link.makefile('rb')
    stream.read(12)
    stream.read(struct.unpack('<HHI', stream.read(8))[1])
    # The preface, and a WELCOME.
    link.sendall(b'CRIURLAY\\x01\\0\\0\\0' + struct.pack('<HHI', 2, 3, 0) + b'\\x0a\\x01x')
    print(stream.read())
";

#[test]
fn a_proxy_sends_nothing_to_another_user_of_its_own_host_who_answers_in_the_caches_place() {
    let bed = Bed::up();
    let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    bed.ok(Host::A, &["install", "-d", "-m", "777", "/srv/pose"]);
    let path = "/srv/pose/link.sock";
    bed.configure(Host::A, "give-up-after", "\"1s\"");
    for (listens, cache) in [("19996", "127.0.0.1:19996"), (path, path)] {
        bed.configure(Host::A, "cache", &format!("{cache:?}"));
        let posing = bed.spawn(Host::A, &[&user[..], &["python3", "-uc", POSE, listens]].concat());
        let put = ["criu-imagectl", "put", "--list", "--finish", "web", "/etc/hostname"];
        wait_until("it is refused", || {
            bed.ok(Host::A, &["systemctl", "try-reload-or-restart", "criu-image-proxy"]);
            let refused = bed.run(Host::A, &put);
            let why = format!(
                "what listens at {cache} gets nothing: its uid, 65534, is not in allow-uids"
            );
            String::from_utf8_lossy(&refused.stderr).contains(&why)
        });
        bed.ok(Host::A, &["pkill", "-x", "python3"]);
        let heard = String::from_utf8(posing.wait_with_output().unwrap().stdout).unwrap();
        assert!(heard.lines().all(|line| line == "b''") && !heard.is_empty(), "{heard}");
    }
}

/// Has two links for a while, and prints what came on them after the WELCOME when one has ended.
const HOLD: &str = "import select, socket, struct
def connect():
    link = socket.create_connection(('127.0.0.1', 9996))
    link.sendall(b'CRIURLAY\\x01\\0\\0\\0' + struct.pack('<HHI', 1, 3, 0) + b'\\x0a\\x01x')
    stream = link.makefile('rb')
    stream.read(12)
    kind, length, _ = struct.unpack('<HHI', stream.read(8))
    stream.read(length)
    assert kind == 2, kind
    return link
links = [connect(), connect()]
print('both are up', flush=True)
came = {link: b'' for link in links}
while True:
    for link in select.select(links, [], [])[0]:
        more = link.recv(4096)
        if not more:
            print(came[link], flush=True)
            link.close()
            while True:
                # The other one goes on.
                other = [other for other in links if other is not link][0]
                assert other.recv(4096)
        came[link] += more
";

#[test]
fn who_has_all_links_gives_one_to_another_host() {
    let bed = Bed::up();
    bed.configure(Host::B, "max", "2");
    bed.configure(Host::B, "allow-uids", "[65534]");
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    let links = || bed.ctl(Host::B, &["status"])[0]["links"].as_array().unwrap().len();
    let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let mut holds = bed.spawn(Host::B, &[&user[..], &["python3", "-uc", HOLD]].concat());
    wait_until("both links are up", || links() == 2);
    let put = ["criu-imagectl", "put", "--list", "--finish", "web", "/etc/hostname"];
    bed.ok(Host::A, &put);
    wait_until("it is in the journal", || {
        let ended = bed.journal(Host::B, &["-u", "criu-image-cache"]);
        let why = "another host wants one, none has more of them than uid 65534";
        ended.iter().any(|entry| entry["MESSAGE"].as_str().unwrap().contains(why))
    });
    let told = BufReader::new(holds.stdout.take().unwrap()).lines().map(Result::unwrap).nth(1);
    assert!(told.as_ref().is_some_and(|told| told.contains("another host wants one")), "{told:?}");
    assert_eq!(links(), 2, "its other link stays");
    bed.ok(Host::B, &["pkill", "-x", "python3"]);
    holds.wait().unwrap();
}
