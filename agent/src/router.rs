//! A `groupByKey` whose key is a jq program: a stage of the agent, so that neither shim nor library carries jq.

use argo_streams_pipeline::KeyExpression;
use argo_streams_shm_protocol::RecordKind;
use argo_streams_shm_protocol::limits::KEY_BYTES_MAX;
use argo_streams_shm_protocol::stage::{BelongsTo, Emit, KeyChoice, OUTPUT_MAIN, StageError};

use crate::internal::{Context, Internal, InternalError};

/// Runs the router until its inputs end.
///
/// # Errors
/// [`InternalError`].
pub async fn run(context: Context, key: KeyExpression) -> Result<(), InternalError> {
    let mut internal = Internal::open(context.control, &context.handover)?;
    let mut records = Vec::new();
    let (mut payload, mut key_bytes) = (Vec::new(), Vec::new());
    loop {
        records.clear();
        let count = internal.stage.recv(&mut records, 64)?;
        for record in &records {
            if record.view.kind != RecordKind::Data {
                internal.stage.done(1)?;
                continue;
            }
            payload.clear();
            internal.stage.append_payload(record, &mut payload);
            let evaluated = match key.evaluate(&payload, &mut key_bytes) {
                Ok(()) if key_bytes.len() > KEY_BYTES_MAX => {
                    Err(format!("the key has {} bytes, the limit is {KEY_BYTES_MAX}", key_bytes.len()))
                }
                evaluated => evaluated.map_err(|error| error.to_string()),
            };
            loop {
                let emitted = match &evaluated {
                    Ok(()) => {
                        let emit =
                            Emit { belongs_to: BelongsTo::Oldest, key: KeyChoice::Set(&key_bytes), ..Emit::default() };
                        internal.stage.emit(OUTPUT_MAIN, &emit, &payload)
                    }
                    Err(reason) => internal.stage.reject(0, reason),
                };
                match emitted {
                    Err(StageError::Full) => internal.wait().await?,
                    result => break result?,
                }
            }
            internal.stage.done(1)?;
        }
        if count == 0 {
            if internal.stage.is_ended() {
                return internal.finish(false).await;
            }
            internal.wait().await?;
        }
    }
}
