//! What [`crate::io`] needs of tokio-uring, and what stands for it where tokio-uring 0.5 does not compile: with musl nothing of this can
//! be made, and [`probe`] says so.

#[cfg(target_env = "musl")]
pub(crate) use absent::{File, block_on, probe};
#[cfg(not(target_env = "musl"))]
pub(crate) use present::{File, block_on, probe};

#[cfg(not(target_env = "musl"))]
mod present {
    use std::io;

    use tokio_uring::buf::BoundedBuf;

    /// Why it cannot be used here, if it cannot.
    pub(crate) fn probe() -> Result<(), String> {
        io_uring::IoUring::new(8).map(drop).map_err(|error| format!("io_uring is refused here: {error}"))
    }

    pub(crate) fn block_on<F: Future>(future: F) -> io::Result<F::Output> {
        Ok(tokio_uring::builder().entries(64).start(future))
    }

    /// A descriptor. Positions of `u64::MAX` are where it stands.
    pub(crate) struct File(tokio_uring::fs::File);

    impl File {
        pub(crate) fn new(file: std::fs::File) -> io::Result<Self> {
            Ok(Self(tokio_uring::fs::File::from_std(file)))
        }

        pub(crate) async fn read_at(&self, buffer: Vec<u8>, position: u64) -> (io::Result<usize>, Vec<u8>) {
            let end = buffer.len();
            let (result, slice) = self.0.read_at(buffer.slice(end..), position).await;
            (result, slice.into_inner())
        }

        pub(crate) async fn write_at(
            &self,
            buffer: Vec<u8>,
            begin: usize,
            position: u64,
        ) -> (io::Result<usize>, Vec<u8>) {
            let (result, slice) = self.0.write_at(buffer.slice(begin..), position).submit().await;
            (result, slice.into_inner())
        }

        pub(crate) async fn sync_data(&self) -> io::Result<()> {
            self.0.sync_data().await
        }
    }
}

#[cfg(target_env = "musl")]
mod absent {
    use std::io;

    const WHY: &str = "this program is built with musl, for which tokio-uring does not compile";

    pub(crate) fn probe() -> Result<(), String> {
        Err(WHY.to_owned())
    }

    pub(crate) fn block_on<F: Future>(_future: F) -> io::Result<F::Output> {
        Err(io::Error::new(io::ErrorKind::Unsupported, WHY))
    }

    /// A descriptor; there is none.
    pub(crate) enum File {}

    impl File {
        pub(crate) fn new(_file: std::fs::File) -> io::Result<Self> {
            Err(io::Error::new(io::ErrorKind::Unsupported, WHY))
        }

        pub(crate) async fn read_at(&self, _buffer: Vec<u8>, _position: u64) -> (io::Result<usize>, Vec<u8>) {
            match *self {}
        }

        pub(crate) async fn write_at(
            &self,
            _buffer: Vec<u8>,
            _begin: usize,
            _position: u64,
        ) -> (io::Result<usize>, Vec<u8>) {
            match *self {}
        }

        pub(crate) async fn sync_data(&self) -> io::Result<()> {
            match *self {}
        }
    }
}
