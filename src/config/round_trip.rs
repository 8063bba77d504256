//! What is printed reads back as the same settings, whatever they are.

use super::*;
use proptest::prelude::*;
use std::{path::PathBuf, time::Duration};

const PATH: &str = "test.toml";

fn span() -> impl Strategy<Value = Duration> {
    (1_000..=100 * 31_557_600_000_000u64).prop_map(Duration::from_micros)
}

fn count() -> impl Strategy<Value = u64> {
    1..=10_000_000u64
}

fn level() -> impl Strategy<Value = tracing::Level> {
    proptest::sample::select(vec![
        tracing::Level::ERROR,
        tracing::Level::WARN,
        tracing::Level::INFO,
        tracing::Level::DEBUG,
        tracing::Level::TRACE,
    ])
}

fn keep() -> impl Strategy<Value = Keep> {
    prop_oneof![Just(Keep::Taken), Just(Keep::Dropped), span().prop_map(Keep::For)]
}

fn address() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9][a-z0-9.-]{0,20}:[1-9][0-9]{0,3}", Just("[::1]:9996".to_owned())]
}

fn file() -> impl Strategy<Value = Option<PathBuf>> {
    proptest::option::of("/[^\\x00]{0,15}").prop_map(|path| path.map(Into::into))
}

prop_compose! {
    fn log()(level in level(), file in file()) -> LogSettings {
        LogSettings { level, file }
    }
}

prop_compose! {
    fn memory()(max_bytes in (1u64 << 20)..(1 << 50)) -> MemorySettings {
        MemorySettings { max_bytes }
    }
}

prop_compose! {
    fn sessions()(
        max in count(), request_timeout in span(), stall_timeout in span(),
        pipe_size in 4096..=1u64 << 30,
    ) -> SessionSettings {
        SessionSettings { max, request_timeout, stall_timeout, pipe_size }
    }
}

prop_compose! {
    fn link()(
        connect_timeout in span(), give_up_after in span(), keep_alive in span(),
        ack_timeout in span(), max_chunk in 64 << 10..=16u64 << 20,
    ) -> LinkSettings {
        LinkSettings { connect_timeout, give_up_after, keep_alive, ack_timeout, max_chunk }
    }
}

prop_compose! {
    fn store()(
        max_bytes in 64 << 10..=4u64 << 60, keep in keep(), keep_damaged in span(),
        quota_wait in span(), restore_wait in span(), max_images in count(), max_snapshots in count(),
    ) -> StoreSettings {
        StoreSettings { max_bytes, keep, keep_damaged, quota_wait, restore_wait, max_images, max_snapshots }
    }
}

fn reads() -> impl Strategy<Value = Reads> {
    prop_oneof![Just(Reads::Socket), Just(Reads::Pipe)]
}

prop_compose! {
    fn proxy_remote()(
        max in count(), idle_timeout in span(), reads in reads(), historical_endings: bool,
    ) -> ProxyRemoteSettings {
        ProxyRemoteSettings { max, idle_timeout, reads, historical_endings }
    }
}

prop_compose! {
    fn cache_remote()(
        max in count(), reads in reads(), historical_endings: bool,
    ) -> CacheRemoteSettings {
        CacheRemoteSettings { max, reads, historical_endings }
    }
}

fn pages() -> impl Strategy<Value = Option<String>> {
    proptest::option::of(address())
}

fn endpoint() -> impl Strategy<Value = Option<Endpoint>> {
    let path = "/[a-z/]{0,15}[a-z]".prop_map(|path| Endpoint::Unix(path.into()));
    proptest::option::of(prop_oneof![address().prop_map(Endpoint::Tcp), path])
}

prop_compose! {
    fn metrics()(
        listen in endpoint(), allow_uids in proptest::collection::vec(0..u32::MAX, 0..4),
    ) -> MetricsSettings {
        MetricsSettings { listen, allow_uids }
    }
}

prop_compose! {
    fn proxy()(
        cache in address(), insecure: bool, work_dir in "/[^\\x00]{0,15}", name in "[a-z._-]{0,64}",
        allow_uids in proptest::collection::vec(0..u32::MAX, 0..4),
        link in link(), sessions in sessions(), memory in memory(), remote in proxy_remote(), log in log(), daemon: bool, pidfile in file(),
        listen in pages(), metrics in metrics(),
    ) -> ProxySettings {
        let work_dir = work_dir.into();
        let pages = ProxyPagesSettings { listen };
        ProxySettings {
            cache, insecure, work_dir, daemon, pidfile, name, allow_uids, link, sessions, memory, remote, pages, metrics, log,
        }
    }
}

prop_compose! {
    fn cache()(
        listen in address(), insecure: bool, work_dir in "/[^\\x00]{0,15}",
        allow_uids in proptest::collection::vec(0..u32::MAX, 0..4), store in store(),
        (keep_alive, hello_timeout, max) in (span(), span(), count()),
        sessions in sessions(), remote in cache_remote(), log in log(), daemon: bool, pidfile in file(),
        pages in pages(), metrics in metrics(),
    ) -> CacheSettings {
        let work_dir = work_dir.into();
        let pages = CachePagesSettings { listen: pages };
        let link = CacheLinkSettings { keep_alive, hello_timeout, max };
        CacheSettings {
            listen, insecure, work_dir, daemon, pidfile, allow_uids, store, link, sessions, remote, pages, metrics, log,
        }
    }
}

proptest! {
    #[test]
    fn printed_proxy_settings_read_back(settings in proxy()) {
        let text = settings.to_toml();
        prop_assert_eq!(ProxySettings::parse(&text, Path::new(PATH)).unwrap(), settings);
    }

    #[test]
    fn printed_cache_settings_read_back(settings in cache()) {
        let text = settings.to_toml();
        prop_assert_eq!(CacheSettings::parse(&text, Path::new(PATH)).unwrap(), settings);
    }

    #[test]
    fn no_text_makes_it_panic(text in "[a-z\\[\\]=\"\n .1-9\u{e4}-\u{fc}]{0,60}") {
        let _ = CacheSettings::parse(&text, Path::new(PATH));
    }
}
