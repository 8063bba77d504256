//! A network between a proxy and a cache that can fail.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

/// Takes links and passes them on.
pub(crate) struct Forwarder {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

/// The proxy's and the cache's.
type Ends = (TcpStream, TcpStream);

#[derive(Default)]
struct State {
    /// The links that were taken.
    links: Mutex<Vec<Arc<Ends>>>,
    /// How many bytes may still go to the cache before the link is cut.
    left: Mutex<Option<u64>>,
    /// Whether what the cache says is kept back.
    held: Mutex<bool>,
    released: Condvar,
}

impl Forwarder {
    /// In front of a cache.
    pub(crate) fn to(cache: SocketAddr) -> Forwarder {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let shared = state.clone();
        thread::spawn(move || {
            for proxy in listener.incoming().map_while(Result::ok) {
                // The cache may be gone: then the link is cut at once.
                if let Ok(cache) = TcpStream::connect(cache) {
                    pass(proxy, cache, &shared);
                }
            }
        });
        Forwarder { address, state }
    }

    /// Cuts the link after so many more bytes to the cache; the next link is a good one.
    pub(crate) fn cut_after(&self, bytes: u64) {
        *self.state.left.lock().unwrap() = Some(bytes);
    }

    /// Cuts it now.
    pub(crate) fn cut(&self) {
        self.state.links.lock().unwrap().drain(..).for_each(|ends| shut(&ends));
    }

    /// Whether the link has been cut since [`cut_after`](Self::cut_after); if not, it will not be.
    pub(crate) fn was_cut(&self) -> bool {
        self.state.left.lock().unwrap().take().is_none()
    }

    /// Keeps back what the cache says.
    pub(crate) fn hold_answers(&self) {
        *self.state.held.lock().unwrap() = true;
    }

    /// Passes it on again.
    pub(crate) fn release_answers(&self) {
        *self.state.held.lock().unwrap() = false;
        self.state.released.notify_all();
    }
}

/// Passes on a link, in both directions.
fn pass(proxy: TcpStream, cache: TcpStream, state: &Arc<State>) {
    for socket in [&proxy, &cache] {
        socket.set_nodelay(true).unwrap();
    }
    let ends = Arc::new((proxy, cache));
    state.links.lock().unwrap().push(ends.clone());
    let (there, back) = ((ends.clone(), state.clone()), (ends, state.clone()));
    thread::spawn(move || {
        let ((ends, state), mut bytes) = (there, vec![0; 1 << 16]);
        while let Ok(len @ 1..) = (&ends.0).read(&mut bytes) {
            let allowed = state.allow(len);
            if (&ends.1).write_all(&bytes[..allowed]).is_err() || allowed < len {
                break;
            }
        }
        shut(&ends);
    });
    thread::spawn(move || {
        let ((ends, state), mut bytes) = (back, vec![0; 1 << 16]);
        while let Ok(len @ 1..) = (&ends.1).read(&mut bytes) {
            state.wait();
            if (&ends.0).write_all(&bytes[..len]).is_err() {
                break;
            }
        }
        shut(&ends);
    });
}

fn shut(ends: &Ends) {
    let _ = (ends.0.shutdown(Shutdown::Both), ends.1.shutdown(Shutdown::Both));
}

impl State {
    /// How many of these bytes may pass.
    fn allow(&self, len: usize) -> usize {
        let mut left = self.left.lock().unwrap();
        match *left {
            Some(bytes) if bytes < len as u64 => {
                *left = None;
                usize::try_from(bytes).unwrap()
            }
            Some(bytes) => {
                *left = Some(bytes - len as u64);
                len
            }
            None => len,
        }
    }

    fn wait(&self) {
        let held = self.held.lock().unwrap();
        drop(self.released.wait_while(held, |held| *held).unwrap());
    }
}
