//! The generated protobuf code is checked in, so that packagers need neither protoc nor a build
//! script. This test makes it again and compares. `BLESS=1 cargo test --test proto` writes it.

// A test's helpers fail by panicking, too.
#![allow(clippy::unwrap_used)]

use std::path::Path;

#[test]
fn the_checked_in_code_is_what_the_proto_files_give() {
    for (proto, package, checked_in) in [
        ("stream.proto", "criu.stream", "src/criu/generated/stream.rs"),
        ("remote.proto", "criu.relay.remote", "src/criu/generated/remote.rs"),
        ("link.proto", "criu.relay.link", "src/wire/generated.rs"),
    ] {
        let made = generate(proto, package);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(checked_in);
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept, made, "{checked_in} is not what proto/{proto} gives: BLESS=1 writes it");
    }
}

fn generate(proto: &str, package: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let descriptors = protox::compile([proto], [root]).unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new().out_dir(out.path()).compile_fds(descriptors).unwrap();
    std::fs::read_to_string(out.path().join(format!("{package}.rs"))).unwrap()
}
