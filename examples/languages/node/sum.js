// A sum for each key, kept in the stage's keyed state: {"key": "apple", "n": 3} adds 3 to that of its key. The sums are written at the end.
'use strict';
const { open } = require('argo-streams');

function amountOf(record) {
  try {
    const { n } = JSON.parse(record.payload);
    return Number.isSafeInteger(n) ? n : null;
  } catch {
    return null;
  }
}

async function main() {
  const stage = open();
  for await (const record of stage) {
    const amount = amountOf(record);
    if (amount === null) {
      await stage.reject('there is no whole number n in it');
      continue;
    }
    const key = record.key ?? '';
    stage.put(key, String(Number(stage.get(key) ?? 0) + amount));
  }
  for (const [key, total] of stage.items()) await stage.emit(`${key} ${total}`);
  await stage.close();
}

main().catch((error) => {
  console.error(`sum: ${error.message}`);
  process.exitCode = 1;
});
