//! A process of the mill with the thread that owns it: starts it, lets faults befall it one after the other, and sees to
//! it that it runs in the end. Never here: which processes there are (see `world`).

use super::history::{Event, History};
use super::schedule::{Fault, Planned};
use crate::redis_server::pause;
use anyhow::{Context as _, bail};
use rustix::process::Signal;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long a process may take to come up, tries included: what it needs may be down as well.
const UP_WITHIN: Duration = Duration::from_secs(90);

/// The wait between two tries to start.
const AGAIN_AFTER: Duration = Duration::from_millis(200);

/// A kind of process: how it is started and ended. All of it may block.
pub trait Kept: Send + 'static {
    /// Its name, for people.
    fn name(&self) -> String;

    /// Starts it and returns once it is ready.
    ///
    /// # Errors
    /// When it does not get ready; it is then tried again.
    fn start(&mut self) -> anyhow::Result<()>;

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    fn signal(&self, signal: Signal) -> anyhow::Result<()>;

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    /// When the system refuses.
    fn kill(&mut self) -> anyhow::Result<()>;

    /// Ends it with SIGTERM, and returns when it has put everything away.
    ///
    /// # Errors
    /// When it does not end in time, or says that it failed.
    fn drain(&mut self) -> anyhow::Result<()>;

    /// Whether it has ended.
    ///
    /// # Errors
    /// When the system refuses to tell.
    fn has_ended(&mut self) -> anyhow::Result<bool>;
}

/// What a member is told to do.
enum Order {
    Suffer(Planned),
    /// Answer when everything before is done and the process runs.
    Run(oneshot::Sender<anyhow::Result<()>>),
    /// Drain for good.
    End(oneshot::Sender<anyhow::Result<()>>),
}

/// A process and its thread. Killed when dropped.
#[derive(Debug)]
pub struct Member {
    orders: Option<mpsc::Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Member {
    /// Starts `process`.
    pub fn new(process: impl Kept, history: History) -> Self {
        let (orders, received) = mpsc::channel();
        let thread = std::thread::spawn(move || Tending { process, history, failed: None }.tend(&received));
        Self { orders: Some(orders), thread: Some(thread) }
    }

    /// Lets a fault befall it, after those before.
    pub fn suffer(&self, planned: Planned) {
        self.give(Order::Suffer(planned));
    }

    /// Waits until all faults have ended and it runs.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn until_it_runs(&self) -> anyhow::Result<()> {
        let (tell, told) = oneshot::channel();
        self.give(Order::Run(tell));
        told.await.context("the thread of a process is gone")?
    }

    /// Drains it for good.
    ///
    /// # Errors
    /// When it does not end in good order.
    pub async fn end(&self) -> anyhow::Result<()> {
        let (tell, told) = oneshot::channel();
        self.give(Order::End(tell));
        told.await.context("the thread of a process is gone")?
    }

    fn give(&self, order: Order) {
        // A thread that is gone shows when it is asked whether its process runs.
        if let Some(orders) = &self.orders {
            drop(orders.send(order));
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // The thread ends with its orders, and its process with it.
        self.orders = None;
        self.thread.take().into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// What the thread owns.
struct Tending<K> {
    process: K,
    history: History,
    /// Why it cannot be kept running any more.
    failed: Option<anyhow::Error>,
}

impl<K: Kept> Tending<K> {
    fn tend(mut self, orders: &mpsc::Receiver<Order>) {
        self.failed = self.start().err();
        while let Ok(order) = orders.recv() {
            match order {
                Order::Suffer(_) if self.failed.is_some() => {}
                Order::Suffer(planned) => {
                    self.history.note(Event::FaultBegan { planned });
                    self.failed = self.suffer(planned).err();
                    self.history.note(Event::FaultEnded { planned });
                }
                // Whoever asked may have given up.
                Order::Run(tell) => drop(tell.send(self.runs())),
                Order::End(tell) => drop(tell.send(self.runs().and_then(|()| self.process.drain()))),
            }
        }
        // It may have ended already.
        drop(self.process.kill());
    }

    fn runs(&mut self) -> anyhow::Result<()> {
        if let Some(failed) = self.failed.take() {
            return Err(failed.context(self.process.name()));
        }
        self.look()
    }

    /// Notes a process that ended by itself, and starts it again.
    fn look(&mut self) -> anyhow::Result<()> {
        if !self.process.has_ended()? {
            return Ok(());
        }
        self.history.note(Event::Crashed { process: self.process.name() });
        self.start()
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            match self.process.start() {
                Ok(()) => return Ok(()),
                Err(error) if begun.elapsed() > UP_WITHIN => return Err(error.context("it does not start")),
                Err(_) => pause(AGAIN_AFTER),
            }
        }
    }

    fn suffer(&mut self, planned: Planned) -> anyhow::Result<()> {
        self.look()?;
        let last = || pause(Duration::from_millis(planned.for_ms));
        match planned.fault {
            Fault::Kill(_) => {
                self.process.kill()?;
                last();
                self.start()
            }
            Fault::Drain(_) => {
                self.process.drain()?;
                last();
                self.start()
            }
            Fault::Stop(_) => {
                self.process.signal(Signal::STOP)?;
                last();
                self.process.signal(Signal::CONT)
            }
            Fault::Cut(..) | Fault::Refuse(_) | Fault::Delay(..) | Fault::HalfClose(..) | Fault::Hold(_) => {
                bail!("a connection's fault cannot befall a process")
            }
        }
    }
}
