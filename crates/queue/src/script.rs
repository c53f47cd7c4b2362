//! A script: called by its hash, and sent whole to a server that does not know it yet.

use crate::keys::whole_slot;
use redis::aio::ConnectionLike;
use redis::{Arg, Cmd, FromRedisValue, RedisResult, ToRedisArgs};

/// A script's text and its hash.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    code: String,
    hash: String,
}

/// A call that is being put together.
pub(crate) struct Call<'a> {
    script: &'a Script,
    by_hash: Cmd,
}

impl Script {
    pub(crate) fn new(code: &str) -> Self {
        Self { code: code.to_owned(), hash: redis::Script::new(code).get_hash().to_owned() }
    }

    /// A call for what `key` stands for. Everything that it reads and writes is in the slot of that key.
    pub(crate) fn key(&self, key: String) -> Call<'_> {
        let mut by_hash = redis::cmd("EVALSHA");
        by_hash.arg(&self.hash).arg(2).arg(&key).arg(whole_slot(&key));
        Call { script: self, by_hash }
    }
}

impl Call<'_> {
    pub(crate) fn arg(&mut self, arg: impl ToRedisArgs) -> &mut Self {
        self.by_hash.arg(arg);
        self
    }

    /// Calls the script. It is not loaded beforehand: of a cluster, only the node that has the slot needs it.
    pub(crate) async fn invoke_async<T: FromRedisValue>(&self, connection: &mut impl ConnectionLike) -> RedisResult<T> {
        match self.by_hash.query_async(connection).await {
            Err(error) if error.code() == Some("NOSCRIPT") => self.whole().query_async(connection).await,
            answered => answered,
        }
    }

    /// The same call with the script's text in place of its hash.
    fn whole(&self) -> Cmd {
        let mut whole = redis::cmd("EVAL");
        whole.arg(&self.script.code);
        for arg in self.by_hash.args_iter().skip(2) {
            if let Arg::Simple(arg) = arg {
                whole.arg(arg);
            }
        }
        whole
    }
}
