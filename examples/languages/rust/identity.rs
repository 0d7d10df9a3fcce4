//! The identity over shared memory: argo-streams conform --transport shm -- ./identity
use argo_streams_sdk::{Error, Stage};

fn main() -> Result<(), Error> {
    let mut stage = Stage::open()?;
    while let Some(record) = stage.next()? {
        record.emit(record.payload())?;
    }
    stage.close()
}
