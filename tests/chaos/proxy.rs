//! A TCP proxy that misbehaves when told to: it resets, refuses, delays, half-closes or holds connections. Never here:
//! when it does so (see `schedule`), or what the bytes mean.

use super::schedule::Direction;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// The largest piece that is passed on at once, in bytes.
const CHUNK_BYTES: usize = 16 * 1024;

/// How long a cut waits for its last bytes to pass.
const CUT_WITHIN: Duration = Duration::from_millis(300);

/// No end to the bytes that may pass.
const UNBOUNDED: u64 = u64::MAX;

/// What all connections of a proxy are subject to.
#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    /// Where connections lead; `None`: nobody is there.
    server: Option<SocketAddr>,
    refuse: bool,
    hold: bool,
    delay: Duration,
    /// Counts the cuts so far; the last lets so many bytes pass.
    cuts: u64,
    cut_after_bytes: u64,
    /// Counts the half-closes so far; the last closes this way, and the other after a while.
    half_closes: u64,
    half_closed: Option<(Direction, Duration)>,
}

/// A running proxy. Its connections end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    _serving: JoinSet<()>,
}

/// Changes a proxy from wherever it is needed.
#[derive(Clone, Debug)]
pub struct Handle {
    weather: watch::Sender<Weather>,
}

impl Proxy {
    /// A proxy to `server`, on a free port of loopback.
    ///
    /// # Errors
    /// When loopback has no free port.
    pub async fn start(server: Option<SocketAddr>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (weather, watched) = watch::channel(Weather { server, ..Weather::default() });
        let mut serving = JoinSet::new();
        serving.spawn(serve(listener, watched));
        Ok(Self { address, weather, _serving: serving })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What changes it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { weather: self.weather.clone() }
    }
}

impl Handle {
    /// Leads new connections to `server`; `None`: to nobody.
    pub fn lead_to(&self, server: Option<SocketAddr>) {
        self.weather.send_modify(|weather| weather.server = server);
    }

    /// Resets every connection once `after_bytes` more have passed on it, soon in any case.
    pub fn cut(&self, after_bytes: u64) {
        self.weather.send_modify(|weather| {
            weather.cuts += 1;
            weather.cut_after_bytes = after_bytes;
        });
    }

    /// Resets new connections at once, until told otherwise.
    pub fn refuse(&self, refuse: bool) {
        self.weather.send_modify(|weather| weather.refuse = refuse);
    }

    /// Lets each chunk wait.
    pub fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }

    /// Lets nothing pass, no byte and no end of a connection, until told otherwise; then all of it passes.
    pub fn hold(&self, hold: bool) {
        self.weather.send_modify(|weather| weather.hold = hold);
    }

    /// Closes one way of every connection, and resets it after a while.
    pub fn half_close(&self, way: Direction, then_reset_after: Duration) {
        self.weather.send_modify(|weather| {
            weather.half_closes += 1;
            weather.half_closed = Some((way, then_reset_after));
        });
    }
}

async fn serve(listener: TcpListener, weather: watch::Receiver<Weather>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((caller, _)) = accepted {
                connections.spawn(carry(caller, weather.clone()));
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection from its beginning to its end.
async fn carry(mut caller: TcpStream, mut weather: watch::Receiver<Weather>) {
    let begun = *weather.borrow_and_update();
    let Some(server) = begun.server.filter(|_| !begun.refuse) else { return reset(&caller) };
    let Ok(mut server) = TcpStream::connect(server).await else { return reset(&caller) };
    // Small messages must not wait for each other: the processes behind the proxy do not either.
    drop(caller.set_nodelay(true).and_then(|()| server.set_nodelay(true)));
    let ended = {
        let left = AtomicU64::new(UNBOUNDED);
        let (caller_out, caller_in) = caller.split();
        let (server_out, server_in) = server.split();
        let way = |direction| Way { direction, begun, weather: weather.clone(), left: &left };
        tokio::select! {
            passed = async { tokio::try_join!(
                way(Direction::ToServer).pass(caller_out, server_in),
                way(Direction::ToCaller).pass(server_out, caller_in),
            ) } => passed.map(drop),
            () = struck(begun, weather.clone(), &left) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    };
    if ended.is_err() {
        reset(&caller);
        reset(&server);
    }
}

/// Ends when a cut or a half-close has come for a connection that `begun` then, and has had its time.
async fn struck(begun: Weather, mut weather: watch::Receiver<Weather>, left: &AtomicU64) {
    let come = |now: &Weather| now.cuts > begun.cuts || now.half_closes > begun.half_closes;
    // The sender lives as long as the proxy, whose connections end with it.
    let Ok(now) = weather.wait_for(come).await.map(|now| *now) else { return };
    if now.cuts > begun.cuts {
        left.store(now.cut_after_bytes, Ordering::Relaxed);
        return sleep(CUT_WITHIN).await;
    }
    sleep(now.half_closed.map_or(Duration::ZERO, |(_, reset_after)| reset_after)).await;
}

/// Lets a socket be reset instead of closed when it is dropped.
fn reset(stream: &TcpStream) {
    // Fails on a socket that is closed already.
    drop(stream.set_zero_linger());
}

/// One way of a connection.
struct Way<'a> {
    direction: Direction,
    /// The weather in which the connection began.
    begun: Weather,
    weather: watch::Receiver<Weather>,
    /// How many bytes may pass before the connection is cut.
    left: &'a AtomicU64,
}

impl Way<'_> {
    /// Passes bytes on until their end. An error stands for a connection that must be reset.
    async fn pass(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut closed = false;
        loop {
            let read = tokio::select! {
                read = from.read(&mut chunk) => read?,
                () = half_closed(self.begun, self.direction, self.weather.clone()), if !closed => {
                    closed = true;
                    to.shutdown().await?;
                    continue;
                }
            };
            self.wait().await;
            if read == 0 {
                return if closed { Ok(()) } else { to.shutdown().await };
            }
            if !closed {
                let may_pass = self.may_pass(read)?;
                to.write_all(&chunk[..may_pass]).await?;
                if may_pass < read {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
            }
        }
    }

    /// Waits as long as a chunk has to.
    async fn wait(&mut self) {
        let delay = self.weather.borrow().delay;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        // An error: the proxy is gone, and so is this connection soon.
        drop(self.weather.wait_for(|weather| !weather.hold).await);
    }

    /// How many of `read` bytes may pass.
    fn may_pass(&self, read: usize) -> io::Result<usize> {
        let bytes = u64::try_from(read).unwrap_or(UNBOUNDED);
        let take = |left: u64| Some(if left == UNBOUNDED { left } else { left.saturating_sub(bytes) });
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or(UNBOUNDED);
        usize::try_from(left.min(bytes)).map_err(io::Error::other)
    }
}

/// Ends when this way of a connection is closed by command.
async fn half_closed(begun: Weather, direction: Direction, mut weather: watch::Receiver<Weather>) {
    let mine =
        |now: &Weather| now.half_closes > begun.half_closes && now.half_closed.is_some_and(|(way, _)| way == direction);
    if weather.wait_for(mine).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(20);

    /// A server that repeats what it is told, behind a proxy, and a connection to it.
    async fn echo() -> (Proxy, TcpStream, JoinSet<io::Result<()>>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let proxy = Proxy::start(Some(listener.local_addr().unwrap())).await.unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await?;
                connections.spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let connection = TcpStream::connect(proxy.address()).await.unwrap();
        (proxy, connection, serving)
    }

    async fn say(connection: &mut TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
        connection.write_all(text).await?;
        let mut answer = vec![0; text.len()];
        connection.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn it_passes_bytes_and_the_end_of_a_connection() {
        let (_proxy, mut connection, _serving) = echo().await;
        assert_eq!(say(&mut connection, b"hello").await.unwrap(), b"hello");
        connection.shutdown().await.unwrap();
        assert_eq!(timeout(SOON, connection.read(&mut [0; 8])).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn a_cut_lets_some_bytes_pass_and_resets() {
        let (proxy, mut connection, _serving) = echo().await;
        say(&mut connection, b"hello").await.unwrap();
        proxy.handle().cut(3);
        // The command and these bytes race; the connection is reset in any case.
        drop(connection.write_all(b"hello").await);
        let mut rest = Vec::new();
        let error = timeout(SOON, connection.read_to_end(&mut rest)).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(rest.len() <= 5, "{rest:?}");
        let mut next = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut next, b"again").await.unwrap(), b"again");
    }

    #[tokio::test]
    async fn what_is_refused_or_leads_nowhere_is_reset() {
        let (proxy, mut connection, _serving) = echo().await;
        say(&mut connection, b"hello").await.unwrap();
        proxy.handle().refuse(true);
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(timeout(SOON, say(&mut refused, b"x")).await.unwrap().is_err());
        assert_eq!(say(&mut connection, b"old").await.unwrap(), b"old", "what is connected stays so");
        proxy.handle().refuse(false);
        proxy.handle().lead_to(None);
        let mut nowhere = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(timeout(SOON, say(&mut nowhere, b"x")).await.unwrap().is_err());
    }

    #[tokio::test]
    async fn what_is_held_passes_later_and_whole() {
        let (proxy, mut connection, _serving) = echo().await;
        say(&mut connection, b"hello").await.unwrap();
        proxy.handle().hold(true);
        connection.write_all(b"later").await.unwrap();
        let mut answer = [0; 5];
        let early = timeout(Duration::from_millis(100), connection.read_exact(&mut answer)).await;
        assert!(early.is_err(), "nothing passes");
        proxy.handle().hold(false);
        timeout(SOON, connection.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"later");
    }

    #[tokio::test]
    async fn a_half_close_ends_one_way_and_then_the_other() {
        let (proxy, mut connection, _serving) = echo().await;
        say(&mut connection, b"hello").await.unwrap();
        proxy.handle().half_close(Direction::ToCaller, Duration::from_millis(50));
        assert_eq!(timeout(SOON, connection.read(&mut [0; 8])).await.unwrap().unwrap(), 0, "it ends, it is not reset");
        let until_reset = async {
            while connection.write_all(b"x").await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, until_reset).await.unwrap();
    }

    #[tokio::test]
    async fn a_delay_is_kept() {
        let (proxy, mut connection, _serving) = echo().await;
        proxy.handle().delay(Duration::from_millis(40));
        let begun = std::time::Instant::now();
        say(&mut connection, b"hello").await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(80), "both ways wait: {:?}", begun.elapsed());
    }
}
