//! A sum for each key, kept in the stage's keyed state: {"key": "apple", "n": 3} adds 3 to that of its key. The sums are written at
//! the end.
use argo_streams_sdk::Stage;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut stage = Stage::open()?;
    while let Some(record) = stage.next()? {
        let value: Option<serde_json::Value> = serde_json::from_slice(&record.payload().to_vec()).ok();
        let Some(amount) = value.and_then(|value| value.get("n")?.as_i64()) else {
            record.reject("there is no whole number n in it")?;
            continue;
        };
        let key = record.key().map_or_else(Vec::new, |key| key.to_vec());
        let total = match record.get(&key)? {
            Some(total) => std::str::from_utf8(&total)?.parse()?,
            None => 0_i64,
        };
        record.put(&key, &(total + amount).to_string())?;
    }
    for item in stage.items() {
        let (key, total) = item?;
        stage.emit(&[key.as_slice(), b" ", total.as_slice()].concat())?;
    }
    stage.close()?;
    Ok(())
}
