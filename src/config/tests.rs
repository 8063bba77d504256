use super::*;

const PATH: &str = "/etc/criu-image-relay/test.toml";

/// The error of a text that is wrong, without its path.
fn error<T: Settings + std::fmt::Debug>(text: &str) -> String {
    let e = T::parse(text, Path::new(PATH)).expect_err(text).to_string();
    e.strip_prefix(PATH).and_then(|e| e.strip_prefix(':')).expect(&e).to_owned()
}

const SPAN: &str = r#"a duration from 1ms to 100y, such as "500ms", "2h 30min" or 30 (seconds)"#;
const MEMORY: &str = concat!(
    r#"a size from 64K to 4E, such as "1M" (K = 1024) or 1048576 (bytes), "#,
    r#"or a share of the machine's memory, such as "50%""#
);
const CHUNK: &str = r#"a size from 64K to 16M, such as "1M" (K = 1024) or 1048576 (bytes)"#;
const PIPE: &str = r#"a size from 4K to 1G, such as "1M" (K = 1024) or 1048576 (bytes)"#;
const COUNT: &str = "a whole number from 1 to 10000000, such as 1024";
const HOST: &str = concat!(
    r#"HOST or HOST:PORT, such as "host-b.example", "192.0.2.7:9996" or "#,
    r#""[2001:db8::7]:9996""#
);
const UIDS: &str = "a list of numeric user ids, such as [1000, 1001]";
const LEVEL: &str = r#""error", "warn", "info", "debug" or "trace""#;
const DIR: &str = r#"an absolute path of at most 80 bytes, such as "/run/criu-image""#;

const FILE: &str = r#"an absolute path, such as "/run/criu-image.pid", or "" for none"#;

#[test]
fn unknown_keys() {
    for (text, message) in [
        (
            "[store]\nkeep = \"taken\"\nmax-byte = 1\n",
            "3:1: unknown key `store.max-byte`; did you mean `store.max-bytes`?",
        ),
        (
            "[store]\n  Max_Bytes = 1",
            "2:3: unknown key `store.Max_Bytes`; did you mean `store.max-bytes`?",
        ),
        ("max-bytes = 1", "1:1: unknown key `max-bytes`; did you mean `store.max-bytes`?"),
        ("[sessions]\nmac = 1", "2:1: unknown key `sessions.mac`; did you mean `sessions.max`?"),
        ("[links]\nmax = 1", "1:2: unknown key `links`; did you mean `link`?"),
        ("log.levle = \"info\"", "1:5: unknown key `log.levle`; did you mean `log.level`?"),
        ("cache = \"host-b\"", "1:1: unknown key `cache`"),
        (
            "\u{fc}ber = 1; \u{fc}",
            "1:1: not TOML: invalid unquoted key, expected letters, numbers, `-`, `_`",
        ),
        ("\"\u{fc}\" = 1\n\"zebra\" = 2", "1:1: unknown key `\u{fc}`"),
        // The first in the text, not in the alphabet.
        ("zebra = 1\nant = 2", "1:1: unknown key `zebra`"),
        ("store = { keep = \"taken\", zebra = 1 }", "1:27: unknown key `store.zebra`"),
        // A wrong value further up does not hide a misspelt key.
        ("insecure = 1\nzebra = 1", "2:1: unknown key `zebra`"),
    ] {
        assert_eq!(error::<CacheSettings>(text), message, "{text}");
    }
}

#[test]
fn wrong_values() {
    for (text, place, found, expected) in [
        (
            "[store]\nmax-bytes = \"12Q\"",
            "2:13: `store.max-bytes`",
            "value: string \"12Q\"",
            MEMORY,
        ),
        ("store.max-bytes = 50", "1:19: `store.max-bytes`", "value: integer `50`", MEMORY),
        ("store.max-bytes = \"101%\"", "1:19: `store.max-bytes`", "value: string \"101%\"", MEMORY),
        ("store.max-bytes = 0.5", "1:19: `store.max-bytes`", "type: floating point `0.5`", MEMORY),
        ("store.quota-wait = \"0\"", "1:20: `store.quota-wait`", "value: string \"0\"", SPAN),
        ("store.quota-wait = 0", "1:20: `store.quota-wait`", "value: integer `0`", SPAN),
        ("store.quota-wait = -3", "1:20: `store.quota-wait`", "value: integer `-3`", SPAN),
        ("store.quota-wait = true", "1:20: `store.quota-wait`", "type: boolean `true`", SPAN),
        ("store.quota-wait = \"101y\"", "1:20: `store.quota-wait`", "value: string \"101y\"", SPAN),
        ("store.max-images = 0", "1:20: `store.max-images`", "value: integer `0`", COUNT),
        ("store.max-images = \"9\"", "1:20: `store.max-images`", "value: string \"9\"", COUNT),
        ("sessions.pipe-size = 4095", "1:22: `sessions.pipe-size`", "value: integer `4095`", PIPE),
        ("sessions.pipe-size = \"5%\"", "1:22: `sessions.pipe-size`", "value: string \"5%\"", PIPE),
        ("[log]\n\n level = \"loud\"", "3:10: `log.level`", "value: string \"loud\"", LEVEL),
        ("log.level = 3", "1:13: `log.level`", "value: integer `3`", LEVEL),
        ("allow-uids = 1000", "1:14: `allow-uids`", "type: integer `1000`", UIDS),
        ("allow-uids = [0,\n \"bob\"]", "2:2: `allow-uids`", "value: string \"bob\"", UIDS),
        ("allow-uids = [-1]", "1:15: `allow-uids`", "value: integer `-1`", UIDS),
        ("allow-uids = [4294967295]", "1:15: `allow-uids`", "value: integer `4294967295`", UIDS),
        ("work-dir = \"run\"", "1:12: `work-dir`", "value: string \"run\"", DIR),
        ("pidfile = \"run/pid\"", "1:11: `pidfile`", "value: string \"run/pid\"", FILE),
        ("log.file = \"x.log\"", "1:12: `log.file`", "value: string \"x.log\"", FILE),
        ("log.file = true", "1:12: `log.file`", "type: boolean `true`", FILE),
        ("listen = 9996", "1:10: `listen`", "value: integer `9996`", HOST),
        ("listen = { port = 1 }", "1:10: `listen`", "type: map", HOST),
    ] {
        let message = format!("{place}: invalid {found}, expected {expected}");
        assert_eq!(error::<CacheSettings>(text), message, "{text}");
    }
    assert_eq!(
        error::<CacheSettings>("insecure = \"yes\""),
        "1:12: `insecure`: invalid value: string \"yes\", expected true or false, without quotes"
    );
    assert_eq!(
        error::<CacheSettings>("store.keep = \"forever\""),
        format!(
            "1:14: `store.keep`: invalid value: string \"forever\", expected \"taken\", \
             \"dropped\", or {SPAN}"
        )
    );
    assert_eq!(
        error::<CacheSettings>("[[link]]\nmax = 1"),
        "1:3: `link`: expected a table, such as the lines that follow `[link]`"
    );
    for (text, found) in [("63K", "63K"), ("16385K", "16385K"), ("99999999999E", "99999999999E")] {
        assert_eq!(
            error::<ProxySettings>(&format!("link.max-chunk = \"{text}\"")),
            format!("1:18: `link.max-chunk`: invalid value: string \"{found}\", expected {CHUNK}")
        );
    }
    assert_eq!(
        error::<ProxySettings>("name = \"host a\""),
        "1:8: `name`: invalid value: string \"host a\", expected at most 64 letters, digits, \
         \".\", \"-\" or \"_\", such as \"host-a\", or \"\" for the host's own name"
    );
}

#[test]
fn not_toml() {
    for (text, message) in [
        ("insecure =", "1:11: not TOML: string values must be quoted, expected literal string"),
        ("[log]\nlevel = \"info\"\nlevel = \"info\"", "3:1: not TOML: duplicate key"),
        ("[log", "1:5: not TOML: unclosed table, expected `]`"),
    ] {
        assert_eq!(error::<CacheSettings>(text), message, "{text}");
    }
}

#[test]
fn addresses() {
    for (text, address) in [
        ("host-b", Some("host-b:9996")),
        ("host-b.example:1", Some("host-b.example:1")),
        ("192.0.2.7", Some("192.0.2.7:9996")),
        ("[::1]", Some("[::1]:9996")),
        ("[2001:db8::7]:80", Some("[2001:db8::7]:80")),
        ("[fe80::1%3]:80", Some("[fe80::1%3]:80")),
        ("/run/tunnel.sock", Some("/run/tunnel.sock")),
        ("/run/", None),
        ("run/tunnel.sock", None),
        ("", None),
        (":9996", None),
        ("::1", None),
        ("host:", None),
        ("host:0", None),
        ("host:65536", None),
        ("[::1]:0", None),
        ("[::1", None),
        ("[host]", None),
        ("two words", None),
        ("-host", None),
        ("tcp://host", None),
    ] {
        let parsed = ProxySettings::parse(&format!("cache = \"{text}\""), Path::new(PATH));
        assert_eq!(parsed.ok().map(|s| s.cache).as_deref(), address, "{text}");
    }
}

#[test]
fn figures_are_served_on_a_path_an_address_or_nowhere() {
    let tcp = |address: &str| Some(Some(Endpoint::Tcp(address.to_owned())));
    let unix = |path: &str| Some(Some(Endpoint::Unix(path.into())));
    let too_long = format!("/{}", "d".repeat(107));
    for (text, endpoint) in [
        ("", Some(None)),
        ("127.0.0.1:9998", tcp("127.0.0.1:9998")),
        ("[::1]:9998", tcp("[::1]:9998")),
        ("localhost:9998", tcp("localhost:9998")),
        ("/run/metrics.sock", unix("/run/metrics.sock")),
        ("127.0.0.1", None),
        ("localhost", None),
        (":9998", None),
        ("metrics.sock", None),
        ("run/metrics.sock", None),
        ("/", None),
        ("/run/", None),
        ("/run/..", None),
        (too_long.as_str(), None),
    ] {
        let parsed = ProxySettings::parse(&format!("metrics.listen = \"{text}\""), Path::new(PATH));
        assert_eq!(parsed.ok().map(|settings| settings.metrics.listen), endpoint, "{text}");
    }
}

#[test]
fn options_replace_their_part_of_an_address() {
    for (text, named) in [
        ("host-b", Some("host-b")),
        ("192.0.2.7", Some("192.0.2.7")),
        ("::1", Some("[::1]")),
        ("[::1]", Some("[::1]")),
        ("fe80::1%3", Some("[fe80::1%3]")),
        ("host-b:1", None),
        ("[::1]:80", None),
        ("[::1", None),
        ("::1]", None),
        ("", None),
        ("two words", None),
    ] {
        assert_eq!(host(text).ok().as_deref(), named, "{text}");
    }
    for (old, host, port, new) in [
        ("a:1", None, None, "a:1"),
        ("a:1", Some("b"), None, "b:1"),
        ("a:1", None, Some(2), "a:2"),
        ("[::1]:1", None, Some(2), "[::1]:2"),
        ("a:1", Some("[::2]"), Some(2), "[::2]:2"),
        ("/run/tunnel:1", None, None, "/run/tunnel:1"),
        ("/run/tunnel:1", Some("b"), None, "b:9996"),
        ("/run/tunnel:1", None, Some(2), "127.0.0.1:2"),
    ] {
        let mut settings = CacheSettings { listen: old.to_owned(), ..CacheSettings::default() };
        settings.shared().set_address(host, port);
        assert_eq!(settings.listen, new);
    }
}

#[test]
fn a_share_of_the_memory() {
    let parsed = CacheSettings::parse("store.max-bytes = \"25 %\"", Path::new(PATH)).unwrap();
    assert_eq!(parsed.store.max_bytes, physical_memory() / 4);
    assert!(physical_memory() > 16 << 20);
}

#[test]
fn files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cache.toml");
    let shown = file.display();
    let load = || CacheSettings::load(Some(&file));
    let failure = || load().unwrap_err().to_string();

    assert_eq!(
        failure(),
        format!("{shown}: no such file; create it, or name no file to run with the defaults")
    );
    fs::write(&file, "insecure = true").unwrap();
    assert_eq!(load().unwrap(), CacheSettings { insecure: true, ..CacheSettings::default() });
    fs::write(&file, b"# caf\xc3\xa9\n# caf\xe9").unwrap();
    assert_eq!(failure(), format!("{shown}:2:6: a byte that is not UTF-8; save the file as UTF-8"));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(failure(), format!("{shown}: cannot be read: Is a directory (os error 21)"));
}

/// An operator's file shows what he changed, as everything else is a comment; and what the
/// comments say is so: with every key uncommented it is the defaults, and no key is missing.
fn shipped<T: Settings + PartialEq + std::fmt::Debug>(text: &str) {
    let path = Path::new(PATH);
    assert_eq!(T::parse(text, path).unwrap(), T::default());

    let is_key = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line != "#";
    let uncommented: Vec<&str> =
        text.lines().map(|line| if is_key(line) { &line[1..] } else { line }).collect();
    let uncommented = uncommented.join("\n");
    assert_eq!(T::parse(&uncommented, path).unwrap(), T::default());

    let mut named = Vec::new();
    key_paths("", &uncommented.parse().unwrap(), &mut named);
    let mut known = Vec::new();
    key_paths("", &T::default().to_toml().parse().unwrap(), &mut known);
    assert_eq!(named, known);
}

fn key_paths(table: &str, value: &toml::Table, paths: &mut Vec<String>) {
    for (key, value) in value {
        let path = format!("{table}.{key}");
        match value {
            toml::Value::Table(inner) => key_paths(&path, inner, paths),
            _ => paths.push(path),
        }
    }
}

#[test]
fn the_shipped_proxy_toml_is_the_defaults() {
    shipped::<ProxySettings>(include_str!("../../config/proxy.toml"));
}

#[test]
fn the_shipped_cache_toml_is_the_defaults() {
    shipped::<CacheSettings>(include_str!("../../config/cache.toml"));
}

#[test]
fn printed() {
    assert_eq!(
        ProxySettings::default().to_toml(),
        "cache = \"127.0.0.1:9996\"\ninsecure = false\nwork-dir = \"/run/criu-image/proxy\"\n\
         daemon = false\npidfile = \"\"\nname = \"\"\nallow-uids = []\n\n\
         [link]\nconnect-timeout = \"5s\"\ngive-up-after = \"30s\"\nkeep-alive = \"10s\"\n\
         ack-timeout = \"1min\"\nmax-chunk = \"1M\"\n\n\
         [sessions]\nmax = 1024\nrequest-timeout = \"10s\"\nstall-timeout = \"2min\"\n\
         pipe-size = \"1M\"\n\n\
         [memory]\nmax-bytes = \"1G\"\n\n\
         [remote]\nmax = 4096\nidle-timeout = \"1h\"\nreads = \"socket\"\n\
         historical-endings = false\n\n\
         [pages]\nlisten = \"127.0.0.1:9997\"\n\n\
         [metrics]\nlisten = \"\"\nallow-uids = []\n\n\
         [log]\nlevel = \"info\"\nfile = \"\"\n"
    );
}
